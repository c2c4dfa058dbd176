"""Number types and mixed precision, on a real device and on `meta`.

`torch.autocast` does nothing to meta tensors, so a dry run of mixed precision needs its own:
`MetaAutocast` makes the casts that CUDA's autocast makes, to which it was compared op by op. The
recomputation of a checkpointed layer runs in backward, outside the forward's autocast region;
torch re-enters a real autocast there by itself, and `checkpoint_contexts` does it for ours.

    with autocast(device, torch.bfloat16):
        loss = model(ids).logits.float().mean()
    loss.backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What CUDA's autocast does to each function, by name: aten/src/ATen/autocast_mode.h of torch 2.13.
LOWER = _names(
    """linear matmul mm bmm mv addmm addmv addbmm addr baddbmm einsum chain_matmul multi_dot vecdot
    linalg_vecdot conv1d conv2d conv3d conv_transpose1d conv_transpose2d prelu
    scaled_dot_product_attention"""
)
FLOAT = _names(  # square: it is made of pow
    """exp expm1 log log10 log2 log1p pow rpow square rsqrt reciprocal tan acos asin cosh sinh
    erfinv softplus layer_norm group_norm rms_norm logsumexp cosine_similarity cross_entropy
    nll_loss kl_div mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy_with_logits
    cdist"""
)
FLOAT_RESULT = _names("softmax log_softmax sum prod cumsum cumprod norm linalg_vector_norm")
WIDEST = _names("addcdiv addcmul bilinear cross dot index_put scatter_add tensordot")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision on that device: weights and inputs of matrix products cast to `dtype`."""
    if device.type == "meta":
        return MetaAutocast(dtype)
    return torch.autocast(device.type, dtype=dtype)


class MetaAutocast(TorchFunctionMode):
    """The casts of CUDA's autocast, on meta tensors.

    As there, the cast of an fp32 weight that trains is made once and kept until the region ends
    (a frozen weight is cast anew each time), and regions nest as one.
    """

    current: MetaAutocast | None = None

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.outer: MetaAutocast | None = None
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> MetaAutocast:
        self.outer = MetaAutocast.current
        self.casts = self.outer.casts if self.outer else {}
        MetaAutocast.current = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *fault: object) -> None:
        super().__exit__(*fault)  # type: ignore[no-untyped-call]
        MetaAutocast.current, self.outer, self.casts = self.outer, None, {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if MetaAutocast.current is None:  # inside a region with autocast disabled
            return func(*args, **kwargs)
        if name in LOWER:
            args, kwargs = _cast_all(args, kwargs, self.lowered)
        elif name in FLOAT:
            args, kwargs = _cast_all(args, kwargs, Tensor.float)
        elif name in FLOAT_RESULT:
            if kwargs.get("dtype") is None and _is_low(args[0] if args else kwargs["input"]):
                kwargs = {**kwargs, "dtype": torch.float32}
        elif name in WIDEST:
            types = {x.dtype for x in (*args, *kwargs.values()) if _is_low(x)}
            if len(types) > 1:
                args, kwargs = _cast_all(args, kwargs, Tensor.float)
        return func(*args, **kwargs)

    def lowered(self, x: Tensor) -> Tensor:
        """`x` in the region's type; the cast of a trained fp32 weight is kept."""
        weight = x.dtype == torch.float32 and x.requires_grad and x.is_leaf and not x._is_view()
        if not weight:
            return x.to(self.dtype)
        if id(x) not in self.casts:
            self.casts[id(x)] = (x, x.to(self.dtype))
        return self.casts[id(x)][1]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that an autocast region around this line casts to; None outside of any."""
    if device.type == "meta":
        return MetaAutocast.current.dtype if MetaAutocast.current else None
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` of torch.utils.checkpoint: recompute under the autocast of the forward."""
    active = MetaAutocast.current
    return nullcontext(), MetaAutocast(active.dtype) if active else nullcontext()


@contextmanager
def _disabled() -> Iterator[None]:
    active, MetaAutocast.current = MetaAutocast.current, None
    try:
        yield
    finally:
        MetaAutocast.current = active


@contextmanager
def autocast_off_on_meta() -> Iterator[None]:
    """Within, `torch.autocast("meta", enabled=False)`, which torch refuses, ends our autocast.

    PEFT writes it around the adapters of experts.
    """
    real = torch.autocast

    def region(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        if device_type == "meta" and not kwargs.get("enabled", True):
            return _disabled()
        return real(device_type, *args, **kwargs)

    torch.autocast = region  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]


def keep_rotary_in_fp32(model: nn.Module) -> None:
    """On meta, transformers' own `autocast(enabled=False)` around rotary angles has no effect."""
    for module in model.modules():
        if "Rotary" in type(module).__name__:
            module.forward = _disabled()(module.forward)


def _is_low(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _cast_all(args: Any, kwargs: Any, cast: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """The arguments with their tensors cast: the last one first, as the C++ of autocast does."""
    named = {name: _cast(kwargs[name], cast) for name in reversed(kwargs)}
    return tuple(reversed([_cast(arg, cast) for arg in reversed(args)])), named


def _cast(value: Any, cast: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every floating-point tensor in it cast, but for fp64 ones."""
    if isinstance(value, Tensor):
        return cast(value) if _is_low(value) else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(x, cast) for x in value)
    return value
