"""Linear layers in 4 or 8 bit: bitsandbytes' own on CUDA, layers of the same storage elsewhere.

The stand-ins compute what bitsandbytes computes, and allocate what it allocates: its kernels are
single operators here, so that a dry run sees their results and not the inside of a kernel.
Read in bitsandbytes 0.50.2: nn/modules.py, autograd/_functions.py, backends/cuda/ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fitcheck.bench.blockwise import (
    BLOCK_4BIT,
    BLOCK_8BIT,
    NF4,
    blocks,
    dequantize_blocks,
    dynamic_code,
    pack_4bit,
    quantize_blocks,
    unpack_4bit,
)
from fitcheck.errors import FitCheckError
from fitcheck.ops import FUSED_TOKENS

OUTLIER = 6.0  # LLM.int8's threshold (arXiv 2208.07339)


def quantize(model: Any, kind: str, compute: torch.dtype, device: torch.device) -> None:
    """Put the linear layers of a model on meta on `device`, in nf4 or int8.

    Embeddings, norms and the vocabulary head are left as they are. Never is more than one layer
    there in full: a 70 B model must not need 140 GB on its way to 40.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, layer in list(model.named_modules()):
        if (type(layer) is nn.Linear or isinstance(layer, Conv1D)) and layer is not head:
            model.set_submodule(path, _quantized(layer, kind, compute, device))
    model.is_loaded_in_4bit = kind == "nf4" and device.type == "cuda"  # what PEFT asks


def _quantized(
    layer: nn.Linear | Conv1D, kind: str, compute: torch.dtype, device: torch.device
) -> nn.Module:
    """A quantized layer of that shape with random weights."""
    rows, columns = layer.weight.shape
    outputs, inputs = (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
    weight = torch.empty(outputs, inputs, dtype=compute, device=device)
    weight.normal_(std=0.02)
    bias = None
    if layer.bias is not None:
        bias = nn.Parameter(torch.zeros(outputs, dtype=compute, device=device), False)
    if device.type == "cuda":
        return _bitsandbytes(weight, bias, kind, compute)
    make = NF4Linear if kind == "nf4" else Int8Linear
    return make(weight, bias, compute)


def _bitsandbytes(
    weight: Tensor, bias: nn.Parameter | None, kind: str, compute: torch.dtype
) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise FitCheckError(
            f"{kind} weights on a card need bitsandbytes", "pip install bitsandbytes"
        ) from None
    outputs, inputs = weight.shape
    with torch.device("meta"):
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(inputs, outputs, bias is not None, compute, True, "nf4")
        else:
            layer = bnb.nn.Linear8bitLt(
                inputs, outputs, bias is not None, has_fp16_weights=False, threshold=OUTLIER
            )
    if kind == "nf4":
        layer.weight = bnb.nn.Params4bit(weight, False, quant_type="nf4", module=layer)
    else:
        layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False)
    layer.bias = bias
    layer._is_hf_initialized = True
    return layer.to(weight.device)  # type: ignore[no-any-return]


@torch.no_grad()
def materialize(model: Any, device: torch.device) -> None:
    """Storage on `device`, and random weights, for all of a model that is still on meta.

    Module by module, and tied weights once, as from_pretrained loads them. For meta itself the
    storage is new too: a trace sees it there, and not the module that transformers built.
    """
    made: dict[int, Tensor] = {}  # weights that several modules share
    for module in model.modules():
        if isinstance(module, _Quantized):
            continue
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    real = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        real = nn.Parameter(real, tensor.requires_grad)
                    made[id(tensor)] = real
                table[name] = made[id(tensor)]
    model.tie_weights()
    if device.type != "meta":
        model.init_weights()


class _Quantized(nn.Linear):
    """A frozen linear layer whose weight is stored otherwise; a Linear, so that PEFT finds it."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.compute = compute
        self.bias = bias  # type: ignore[assignment]
        self._is_hf_initialized = True


class NF4Linear(_Quantized):
    """bitsandbytes' Linear4bit with double quantization: 0.516 bytes a weight."""

    absmax: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute: torch.dtype) -> None:
        super().__init__(weight, bias, compute)
        packed, absmax, scale, offset = _quantize_nf4(weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        code = torch.empty(16, device=weight.device)
        self.register_buffer("code", code.copy_(torch.tensor(NF4)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.to(self.compute)
        if torch.is_grad_enabled() and x.requires_grad:
            return _NF4Product.apply(x, self).to(given)  # type: ignore[no-any-return,no-untyped-call]
        return self.product(x).to(given)

    def product(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias; a few tokens go without the weight in 16 bit."""
        if x.shape[:-1].numel() < FUSED_TOKENS:
            quantized = (self.weight, self.absmax, self.scale, self.offset)
            return nf4_product(x, *quantized, self.bias)  # type: ignore[no-any-return]
        absmax = dequantize_absmax(self.absmax, self.scale)
        total = absmax + self.offset
        return F.linear(x, dequantize_nf4(self.weight, total, *self._shape), self.bias)

    def dequantized(self) -> Tensor:
        """The weight [out, in] in the compute type."""
        absmax = dequantize_absmax(self.absmax, self.scale).add_(self.offset)
        return dequantize_nf4(self.weight, absmax, *self._shape)  # type: ignore[no-any-return]

    @property
    def _shape(self) -> tuple[int, int, torch.dtype]:
        return self.out_features, self.in_features, self.compute


class _NF4Product(torch.autograd.Function):
    """Saves no activation: the weight is frozen, and dequantized again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(gradient, ctx.layer.dequantized().to(gradient.dtype)), None


class Int8Linear(_Quantized):
    """bitsandbytes' Linear8bitLt without outliers, for inference: a byte a weight.

    The columns of a hidden state that hold outliers are multiplied in 16 bit besides; random
    weights make none, and they take little.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute: torch.dtype) -> None:
        super().__init__(weight, bias, compute)
        quantized, scale = quantize_rows(weight.half())
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        half = flat.to(torch.float16)
        quantized, scale = quantize_rows(half)
        outliers = half.abs() >= OUTLIER
        del half, outliers
        product = torch._int_mm(quantized, self.weight.t())
        out = dequantize_product(product, scale, self.scale).to(x.dtype)
        if self.bias is not None:
            out = out.add_(self.bias)
        return out.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed weight, 8-bit block maxima, their fp32 scales and their mean."""
    count = weight.numel()
    if weight.is_meta:
        groups = blocks(count, BLOCK_4BIT)
        return (
            weight.new_empty(((count + 1) // 2, 1), dtype=torch.uint8),
            weight.new_empty(groups, dtype=torch.uint8),
            weight.new_empty(blocks(groups, BLOCK_8BIT), dtype=torch.float32),
            weight.new_empty((), dtype=torch.float32),
        )
    indices, maxima = quantize_blocks(weight, torch.tensor(NF4), BLOCK_4BIT)
    offset = maxima.mean()
    absmax, scale = quantize_blocks(maxima - offset, dynamic_code(signed=True), BLOCK_8BIT)
    return pack_4bit(indices), absmax, scale, offset


@torch.library.custom_op("fitcheck::dequantize_absmax", mutates_args=())
def dequantize_absmax(absmax: Tensor, scale: Tensor) -> Tensor:
    """The block maxima, less their mean, in fp32."""
    return dequantize_blocks(absmax, scale, dynamic_code(signed=True), BLOCK_8BIT)


@dequantize_absmax.register_fake
def _(absmax: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(absmax, dtype=torch.float32)


@torch.library.custom_op("fitcheck::dequantize_nf4", mutates_args=())
def dequantize_nf4(
    packed: Tensor, absmax: Tensor, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The weight [outputs, inputs]."""
    indices = unpack_4bit(packed, outputs * inputs)
    values = dequantize_blocks(indices, absmax, torch.tensor(NF4), BLOCK_4BIT)
    return values.view(outputs, inputs).to(dtype)


@dequantize_nf4.register_fake
def _(packed: Tensor, absmax: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(outputs, inputs, dtype=dtype)


@torch.library.custom_op("fitcheck::nf4_product", mutates_args=())
def nf4_product(
    x: Tensor, packed: Tensor, absmax: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None
) -> Tensor:
    """x @ weight.T + bias in one kernel."""
    maxima = dequantize_absmax(absmax, scale) + offset
    outputs = 2 * packed.numel() // x.shape[-1]
    return F.linear(x, dequantize_nf4(packed, maxima, outputs, x.shape[-1], x.dtype), bias)


@nf4_product.register_fake
def _(
    x: Tensor, packed: Tensor, absmax: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2 * packed.numel() // x.shape[-1])


@torch.library.custom_op("fitcheck::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in int8 with one fp32 maximum."""
    maxima = x.abs().amax(1).float()
    return (x * (127 / maxima.clamp(min=1e-8))[:, None]).round().to(torch.int8), maxima


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("fitcheck::dequantize_product", mutates_args=())
def dequantize_product(product: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """An int32 product of int8 matrices as fp16."""
    return (product * rows[:, None] * columns / (127 * 127)).half()


@dequantize_product.register_fake
def _(product: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.empty_like(product, dtype=torch.float16)
