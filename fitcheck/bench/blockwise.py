"""Block-wise quantization as bitsandbytes does it, in plain PyTorch for machines without a card.

8 bit: each block of 256 values shares one fp32 maximum, a value is the nearest of 256 numbers whose
density follows their size (arXiv 2110.02861). 4 bit: NF4 in blocks of 64, whose maxima are
themselves quantized to 8 bit (arXiv 2305.14314).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_8BIT, BLOCK_4BIT = 256, 64

# Quantiles of a normal distribution, with an exact zero: arXiv 2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def dynamic_code(signed: bool) -> Tensor:
    """The 256 numbers of the dynamic 8-bit type in [-1, 1] (or [0, 1]), in order.

    Seven decades; each decade further down has half as many numbers, at the middles of equal steps.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        steps = 2 ** (decade if signed else decade + 1)
        bounds = torch.linspace(0.1, 1, steps + 1).tolist()
        middles = [10.0 ** (decade - 6) * (low + high) / 2 for low, high in pairwise(bounds)]
        numbers += middles + [-middle for middle in middles if signed]
    return torch.tensor(sorted(numbers))


def blocks(count: int, size: int) -> int:
    """How many blocks that many values take."""
    return -(-count // size)


def quantize_blocks(values: Tensor, code: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices into `code` (uint8, flat) and the fp32 maximum of each block of `size` values."""
    flat = values.flatten().float()
    padded = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    maxima = padded.abs().amax(1)
    scaled = padded / maxima.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    middles = (code[1:] + code[:-1]) / 2
    return torch.bucketize(scaled, middles).flatten()[: len(flat)].to(torch.uint8), maxima


def dequantize_blocks(indices: Tensor, maxima: Tensor, code: Tensor, size: int) -> Tensor:
    """The values (fp32, flat) that indices and maxima stand for."""
    return code[indices.int()] * maxima.repeat_interleave(size)[: len(indices)]


def pack_4bit(indices: Tensor) -> Tensor:
    """Two 4-bit indices to a byte [(n + 1) // 2, 1], the first in the upper half."""
    even = F.pad(indices, (0, len(indices) % 2))
    return (even[0::2] << 4 | even[1::2])[:, None]


def unpack_4bit(packed: Tensor, count: int) -> Tensor:
    """The first `count` indices of packed bytes."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[:count]
