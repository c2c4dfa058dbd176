"""Attention on `meta` tensors as a CUDA card would run it.

PyTorch picks an attention kernel by card, type, mask and shape; on `meta` it always takes the math
path, whose tokens x tokens matrix no card would have allocated. While `as_on_cuda(...)` is active,
`F.scaled_dot_product_attention` calls the operator that CUDA would have called, whose meta kernel
and autograd formula are PyTorch's own: what is saved for backward is then right. What such a kernel
allocates for itself alone is in workspaces.py.

    with as_on_cuda((8, 0)):
        model(input_ids)  # attn_implementation=implementation("sdpa")

The rules were compared with `torch._fused_sdp_choice` of the CUDA build of PyTorch 2.13.0, for
2 880 combinations of type, head dimension, mask, grouping and gradient on each of seven
compute capabilities. cuDNN is chosen as with cuDNN above 9.15, which that build ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from fitcheck.bench.precision import autocast_dtype

aten = torch.ops.aten

FLASH, EFFICIENT, CUDNN, MATH = "flash", "efficient", "cudnn", "math"


def kernel(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masked: bool,
    causal: bool,
) -> str:
    """The kernel that CUDA picks, in torch's default order; all tensors are [B, heads, S, D]."""
    head_dim, tokens, keys = query.shape[-1], query.shape[-2], key.shape[-2]
    grouped = query.shape[1] != key.shape[1]
    same = key.shape[-1] == value.shape[-1] == head_dim
    half = query.dtype in (torch.bfloat16, torch.float16)
    ampere = capability >= (8, 0)
    # check_prefer_cudnn_attention: Hopper and data-centre Blackwell put cuDNN first.
    widest = {9: 256, 10: 128}.get(capability[0], 0)
    if half and same and head_dim % 8 == 0 and head_dim <= widest and keys > 1:
        return CUDNN
    flash = half and ampere and same and not masked and head_dim <= 256
    if causal and tokens != keys:
        flash = False
    # check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120
    if needs_grad(query, key, value) and 192 < head_dim <= 224:
        flash = flash and capability not in ((8, 6), (8, 9), (12, 0), (12, 1))
    if flash:
        return FLASH
    typed = query.dtype in (torch.float32, torch.float16) or ampere
    aligned = head_dim % (8 if half else 4) == value.shape[-1] % (8 if half else 4) == 0
    return EFFICIENT if typed and aligned and not grouped else MATH


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the backward of an operation on these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def implementation(attention: str) -> str:
    """The transformers `attn_implementation` for that choice of a plan, without other packages.

    For "flash" a stand-in for flash-attn: its kernel is also PyTorch's own. The name must not have
    "flash" in it, at which transformers asks for the package.
    """
    if attention != "flash":
        return attention
    AttentionInterface.register("unpadded", _unpadded)
    AttentionMaskInterface.register("unpadded", flash_attention_mask)
    return "unpadded"


@contextmanager
def as_on_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Run `F.scaled_dot_product_attention` on meta tensors as that compute capability does."""
    real: Any = F.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        tensors = (query, key, value)
        options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p}
        options["is_causal"] = is_causal
        if torch._C._is_torch_function_mode_enabled():  # mixed precision on meta casts here
            own: Any = scaled_dot_product_attention
            options |= {"scale": scale, "enable_gqa": enable_gqa}
            return handle_torch_function(own, tensors, *tensors, **options)
        if not query.is_meta:
            return real(*tensors, **options, scale=scale, enable_gqa=enable_gqa)
        options |= {"scale": scale, "enable_gqa": enable_gqa}
        return _attention(capability, *tensors, **options)

    functions: Any = F
    softmax, dropout = functions.softmax, functions.dropout
    functions.scaled_dot_product_attention = scaled_dot_product_attention
    functions.softmax, functions.dropout = _softmax, _dropout
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.softmax = real, softmax
        functions.dropout = dropout


_real_softmax, _real_dropout = F.softmax, F.dropout


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout; CUDA's keeps a mask of booleans, the general one noise in the input's type."""
    if input.is_meta and training and 0 < p < 1 and not inplace:
        return torch.native_dropout(input, p, True)[0]
    return _real_dropout(input, p, training, inplace)


def _softmax(input: Tensor, dim: int | None = None, *rest: Any, **options: Any) -> Tensor:
    """F.softmax; CUDA reads fp16 and writes fp32 in one kernel, without a copy (SoftMax.cpp)."""
    if input.is_meta and input.dtype == torch.float16 and options.get("dtype") == torch.float32:
        return aten._softmax(input, dim, True)  # type: ignore[no-any-return]
    return _real_softmax(input, dim, *rest, **options)


def _attention(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """at::scaled_dot_product_attention with the device's choice made by `kernel`."""
    mask, dropout, causal = attn_mask, dropout_p, is_causal
    chosen = kernel(capability, query, key, value, mask is not None, causal)
    if mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    if chosen == MATH:
        return _math(query, key, value, mask, dropout, causal, scale, enable_gqa)
    if chosen == FLASH:
        if scale is None:
            scale = query.shape[-1] ** -0.5
        width = query.shape[-1]
        if width % 8:
            query, key, value = (F.pad(t, (0, -width % 8)) for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout, causal, False, scale=scale
        )[0]
        return out[..., :width] if width % 8 else out  # type: ignore[no-any-return]
    keep = needs_grad(query, key, value)
    if chosen == CUDNN:
        return aten._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
            query, key, value, mask, keep, dropout, causal, False, scale=scale
        )[0]
    if mask is not None:
        mask = _aligned(mask).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, mask, keep, dropout, causal, scale=scale
    )[0]


def _math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    """_scaled_dot_product_attention_math of attention.cpp.

    Ungrouped, a single head of keys is seen by all queries, and torch.matmul copies it for each.
    Its own code, since PyTorch adds the mask out of place while a dispatch mode is active.
    """
    dtype, tokens, keys = query.dtype, query.shape[-2], key.shape[-2]
    wide = [t.float() if t.element_size() == 2 else t for t in (query, key, value)]
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    query = wide[0] * root
    if causal:
        every = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()
        mask = _additive(every, query.dtype)
        del every
    _, key, value = wide
    groups = query.shape[1] // key.shape[1]
    if grouped and groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(-2, -1) * root)
    if mask is not None:
        scores.add_(mask)
    scores = aten._safe_softmax(scores, -1)
    if dropout:
        scores = F.dropout(scores, dropout)
    weights = scores.to(dtype)  # the operator's second result: made first, and dropped at its end
    out = torch.matmul(scores, value).to(dtype)
    del weights, wide
    return out


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where a mask of booleans is true, else minus infinity: convert_boolean_attn_mask."""
    never = torch.full((), float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), never)


def _aligned(mask: Tensor) -> Tensor:
    """Rows padded to a multiple of 8 elements, unless all strides are: preprocess_mask there."""
    if all(stride % 8 == 0 for stride in mask.stride()[:-1]):
        return mask
    keys = mask.shape[-1]
    return F.pad(mask, (0, -keys % 8))[..., :keys]


def _unpadded(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' flash_attention_forward: padded rows are unpadded by copies, and padded again.

    As many tokens are taken to be real as there are: the padding of a few rows is no saving.
    """
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if query.dtype == torch.float32:  # rotated by fp32 angles; the kernel knows 16-bit types alone
        dtype = autocast_dtype(query.device) or next(module.parameters()).dtype
        query, key, value = (t.to(dtype) for t in (query, key, value))
    rows, tokens, heads, width = query.shape
    keys = key.shape[1]
    causal = tokens > 1 and (module.is_causal if is_causal is None else is_causal)
    ends = kwargs.get("cu_seq_lens_q")
    if mask is None and ends is None:
        return _flash(query, key, value, None, tokens, keys, dropout, causal, scaling), None
    if ends is not None:  # packed rows need no copies
        longest = kwargs["max_length_q"]
        query, key, value = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
        out = _flash(query, key, value, (ends, ends), longest, longest, dropout, causal, scaling)
        return out.view(rows, tokens, heads, width), None
    real = torch.empty(rows * keys, dtype=torch.int64, device=key.device)
    ends = torch.empty(rows + 1, dtype=torch.int32, device=key.device)
    key, value = (t.reshape(-1, *t.shape[2:])[real] for t in (key, value))
    flat_query = query.reshape(-1, heads, width)
    if tokens > 1:
        flat_query = flat_query[real]
    out = _flash(flat_query, key, value, (ends, ends), tokens, keys, dropout, causal, scaling)
    if tokens > 1:
        padded = torch.zeros_like(out)
        padded[real] = out
        out = padded
    return out.view(rows, tokens, heads, width), None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: tuple[Tensor, Tensor] | None,
    tokens: int,
    keys: int,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """FlashAttention-2 over [rows, tokens, heads, D], or over all rows' tokens in one."""
    return aten._flash_attention_forward(  # type: ignore[no-any-return]
        *(query, key, value, *(ends or (None, None)), tokens, keys, dropout, causal, False),
        scale=scale,
    )[0]
