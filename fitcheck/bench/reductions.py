"""The partial results of reductions: sums over tokens, as of a norm's gradient, hide a lot.

A sum of [4096, 4096] numbers over rows holds 108 MiB while it runs. The rules are those of
setReduceConfig in Reduce.cuh of PyTorch 2.13.0, with TensorIterator's order of dimensions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from torch import Tensor

from fitcheck.kernels import Card

Sizes = tuple[int, ...]
INDEXED = 2**31 - 1  # bytes that 32-bit indices reach: can_use_32bit_indexing of TensorIterator.cpp


def partial_results(card: Card, source: Tensor, dims: Any, result: int) -> Sizes:
    """What summing over `dims` (None: all) takes; `result`: bytes of one partial result."""
    wanted = [dims] if isinstance(dims, int) else dims or range(source.dim())
    reduced = tuple(sorted(d % source.dim() for d in wanted)) if source.dim() else ()
    shape, strides = list(source.shape), source.stride()
    width, whole = source.element_size(), source.nbytes
    while width * math.prod(shape) > INDEXED:  # halves, one after the other
        widest = max(range(len(shape)), key=lambda d: shape[d] * strides[d])
        shape[widest] = parts(shape[widest], 2)
    sizes = _reduction(tuple(shape), strides, reduced, result, card.sms, card.threads)
    if whole <= INDEXED or width > 2:
        return sizes
    kept = math.prod(n for d, n in enumerate(source.shape) if d not in reduced)
    return result * kept, *sizes  # sums of 16-bit halves meet in fp32


@lru_cache(maxsize=4096)
def _reduction(
    shape: Sizes, strides: Sizes, reduced: Sizes, result: int, sms: int, threads: int
) -> Sizes:
    """setReduceConfig and global_memory_size of Reduce.cuh."""
    dims = _coalesced(shape, strides, reduced)
    kept = [d for d in dims if not d[2]]
    gone = [d for d in dims if d[2]]
    outputs, inputs = (math.prod(d[0] for d in some) for some in (kept, gone))
    if not gone:
        return ()
    along = not kept or gone[0][1] < kept[0][1]  # the reduction runs along the fastest dimension
    fastest, dim0, dim1 = (gone[0][1], inputs, outputs) if along else (kept[0][1], outputs, inputs)
    vector = 1
    if fastest == 1:
        if along:
            if dim0 >= 128 and len(gone) == 1:
                dim0 //= 4
        else:
            vector = 4
            for n in (kept[0][0], *(d[1] for d in dims if d is not kept[0])):
                while n % vector:
                    vector //= 2
            dim0 //= vector
    most = 512 // vector
    width0, height0 = min(_pow2(dim0), most), min(_pow2(dim1), most)
    width = min(width0, 32)
    height = min(height0, most // width)
    width = min(width0, most // height)
    step_in = width if along else 1
    step_out = 1 if along else width
    per_thread = parts(inputs, step_in)
    across = per_thread >= min(height * 16, 256)
    if across:
        step_in *= height
        per_thread = parts(inputs, step_in)
    else:
        step_out *= height
    grid = parts(outputs // vector, step_out)
    target = sms * (threads // (width * height))
    if not across or per_thread < 256 or grid > target:
        return ()
    blocks = max(min(parts(target, grid), parts(per_thread, 16)), parts(per_thread, 256))
    if blocks == 1:
        return ()
    return result * outputs * blocks * (1 if along else width * vector), 4 * grid


def _coalesced(shape: Sizes, strides: Sizes, reduced: Sizes) -> list[tuple[int, int, bool]]:
    """(length, stride, reduced) of the dimensions as TensorIterator orders and merges them."""
    dims = [(n, s, d in reduced) for d, (n, s) in enumerate(zip(shape, strides, strict=True))]
    dims = [d for d in dims if d[0] != 1]
    dims.sort(key=lambda d: (not d[2], d[1]))
    merged: list[tuple[int, int, bool]] = []
    for length, stride, gone in dims:
        if merged and merged[-1][2] == gone and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * length, merged[-1][1], gone)
        else:
            merged.append((length, stride, gone))
    return merged


def _pow2(n: int) -> int:
    """The largest power of two not above n."""
    return 1 << (max(n, 1).bit_length() - 1)


def parts(n: int, size: int) -> int:
    """How many pieces of that size cover n."""
    return -(-n // size)
