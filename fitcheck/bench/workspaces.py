"""What CUDA kernels allocate for themselves while they run: invisible on `meta`, gone afterwards.

Each function returns the sizes in bytes that one call of an operator holds beside its outputs, in
the order of their allocation. They were recorded from the CUDA build of PyTorch 2.13.0, run on the
host, and agree with it to the byte (tests/test_trace.py); sources are files of that release.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fitcheck.kernels import Card

aten = torch.ops.aten
MIB = 2**20
Sizes = tuple[int, ...]


def cublas(card: Card) -> int:
    """cuBLAS's own, one for each handle (a thread's) and stream; never freed: CublasHandlePool.cpp.

    32 MiB on compute capability 9, 10 and 12, else :4096:2:16:8, KiB times count.
    """
    return 32 * MIB if card.capability[0] in (9, 10, 12) else (4096 * 2 + 16 * 8) * 1024


def flash_forward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Partial results where the keys are split to fill the card: flash_api.cpp, set_params_splitkv."""
    (batch, heads, tokens, width), (_, groups, keys, _) = args[0].shape, args[1].shape
    return _split_results(card, batch, heads, groups, tokens, keys, width)


def flash_backward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """dO x O, dQ in fp32, and dK and dV for every query head: flash_api.cpp, mha_bwd.

    Before them copies of dO and O, unless they lie in memory as [batch, tokens, heads, D].
    """
    query, key = args[1], args[2]
    batch, heads, tokens, width = query.shape
    copies = [t.nbytes for t in (args[0], args[4]) if not t.transpose(1, 2).is_contiguous()]
    rows = batch * heads * _up(tokens, 128)
    own = (4 * rows, 4 * rows * _flash_width(width))
    return *copies, *own, *_expanded(query, key, heads, key.shape[1])


def flash_package_forward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """As `flash_forward`, of [rows, tokens, heads, D]; rows of different lengths: mha_varlen_fwd."""
    query, key, ends = args[0], args[1], args[3]
    if ends is None:
        (batch, tokens, heads, width), (_, keys, groups, _) = query.shape, key.shape
        return _split_results(card, batch, heads, groups, tokens, keys, width)
    tokens, keys, batch = args[5], args[6], ends.numel() - 1
    heads, groups, width = query.shape[-2], key.shape[-2], query.shape[-1]
    if tokens > 1 or heads == groups:  # only decoding splits its keys there
        return ()
    return _split_results(card, batch, heads, groups, tokens, keys, width)


def flash_package_backward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """As `flash_backward`, of [rows, tokens, heads, D]; rows of different lengths: mha_varlen_bwd."""
    query, key, ends = args[1], args[2], args[6]
    heads, width = query.shape[-2:]
    if ends is None:
        rows = query.shape[0] * _up(query.shape[1], 128) * heads
    else:
        rows = (query.shape[0] + 128 * (ends.numel() - 1)) * heads
    return 4 * rows, 4 * rows * _flash_width(width), *_expanded(query, key, heads, key.shape[-2])


def _expanded(query: Tensor, key: Tensor, heads: int, groups: int) -> Sizes:
    """dK and dV of every query head."""
    size = key.numel() // groups * heads * query.element_size()
    return (size, size) if heads != groups else ()


def _split_results(
    card: Card, batch: int, heads: int, groups: int, tokens: int, keys: int, width: int
) -> Sizes:
    if tokens == 1 and heads > groups and width % 8 == 0:  # seqlenq_ngroups_swapped
        heads, tokens = groups, heads // groups
    block = 256 if width <= 64 else 128 if width <= 128 else 64
    splits = _splits(batch * heads * _parts(tokens, 64), 2 * card.sms, _parts(keys, block))
    each = 4 * splits * batch * heads * tokens
    return (each, each * _flash_width(width)) if splits > 1 else ()


def cudnn_backward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Decided inside cuDNN and not known; flash attention's stands in for it (unverified)."""
    return flash_backward(card, args, out)


def efficient_forward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """The output in fp32 where it does not fit into registers: kernel_forward.h."""
    batch, heads, tokens, width = args[0].shape[:3] + args[2].shape[-1:]
    half = args[0].element_size() == 2
    return (4 * batch * heads * tokens * width,) if half and width > 128 else ()


def efficient_delta(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """dO x O in fp32, of 16-bit types a kernel's work: attention_backward.cu."""
    rows = 4 * args[0].numel() // args[0].shape[-1]
    return (args[0].nbytes, rows, rows) if args[0].element_size() == 4 else ()


def efficient_backward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """dO x O, and dQ (of wide heads also dK, dV) in fp32 tiles: kernel_backward.h, workspace_size."""
    query, key = args[1], args[2]
    batch, heads, tokens, width = query.shape
    pairs, half = batch * heads, query.element_size() == 2
    tile, keys_tile = _efficient_tiles(card.capability, half, width)
    floats = _parts(tokens, tile) * _parts(width, keys_tile) * (4 + tile * keys_tile)
    if half and width > 128:
        parts = max(1, min(_parts(key.shape[2], keys_tile), 200 // pairs))
        floats += 2 * parts * keys_tile * _up(width, tile)
    delta = 4 * pairs * tokens
    return delta, 4 * pairs * floats


def _efficient_tiles(capability: tuple[int, int], half: bool, width: int) -> tuple[int, int]:
    """Queries and keys of one tile, by the order of kernels/cutlassB.h."""
    ampere = capability >= (8, 0)
    if width <= 64 or (not half and not ampere):
        return 64, 64
    if not half or width > 128 or not ampere:
        return 128, 64
    return (128, 64) if width <= 96 and capability in ((8, 6), (8, 9)) else (128, 128)


def embedding_backward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Sorted ids and partial sums, above 3 072 tokens: EmbeddingBackwardKernel.cu."""
    gradient, ids, rows = args[0], args[1], args[2]
    tokens = ids.numel()
    if tokens <= 3072:
        return ()
    distinct = min(tokens, rows)
    partial = tokens // 10 + distinct  # NROWS_PER_THREAD
    each = 8 * tokens
    sorted_ids = (each, each, each, 8, 8, 8 * distinct, 8 * distinct)
    return *sorted_ids, 8 * partial, 4 * partial * gradient.shape[-1]


def safe_softmax(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Which scores are minus infinity, and which rows all are: SoftMax.cpp."""
    scores = args[0].numel()
    return scores, scores // args[0].shape[-1], args[0].element_size()


def softmax_backward(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """gradient x output: SoftMax.cu."""
    return (args[0].nbytes,)


def scan(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """The input in the result's type: ScanKernels.cpp."""
    cast = () if args[0].dtype == out.dtype else (out.nbytes,)
    one_row = out.numel() == out.shape[args[1]]
    return (*cast, 1279) if one_row else cast  # CUB's own


def multinomial(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Checks, exponential noise of the size of the probabilities, an argmax: Distributions.cpp."""
    rows = args[0]
    return 4, 4, 1, 1, rows.nbytes, *argmax(card, (rows, -1), out)


def argmax(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """As `reduction`, with a value and an index for each partial result."""
    return _reduce(card, args[0], args[1] if len(args) > 1 else None, 16)


def foreach_norm(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Norms of chunks of 65 536 elements, fp32: ForeachReduceOp.cu."""
    tensors = args[0]
    chunks = max(_parts(t.numel(), 65536) for t in tensors)
    return (4 * len(tensors) * chunks,)


def reduction(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Partial results of blocks, where the rows of one output are shared out: Reduce.cuh."""
    source = args[0]
    dims = args[1] if len(args) > 1 else None
    partial = _reduce(card, source, dims, 4 if source.is_floating_point() else 8)
    if source.is_floating_point() or source.dtype == out.dtype:
        return partial
    return source.numel() * out.element_size(), *partial  # cast first


def index_put(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Adding up at indices sorts them first: Indexing.cu, index_put_with_sort_kernel."""
    count = 8 * max(i.numel() for i in args[1] if i is not None)
    return (count,) * 5 if len(args) > 3 and args[3] else ()


def index(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Indices in one and the same layout: AdvancedIndex, TensorAdvancedIndexing.cpp."""
    given = [i for i in args[1] if i is not None]
    spread = torch.broadcast_tensors(*given)
    if len({i.stride() for i in spread}) == 1:
        return ()
    return tuple(8 * i.numel() for i in spread if not i.is_contiguous())


def _reduce(card: Card, source: Tensor, dims: Any, result: int) -> Sizes:
    """`result`: bytes of one partial result."""
    wanted = [dims] if isinstance(dims, int) else dims or range(source.dim())
    reduced = tuple(sorted(d % source.dim() for d in wanted)) if source.dim() else ()
    shape, strides = tuple(source.shape), source.stride()
    return _reduction(shape, strides, reduced, result, card.sms, card.threads)


@lru_cache(maxsize=4096)
def _reduction(
    shape: Sizes, strides: Sizes, reduced: Sizes, result: int, sms: int, threads: int
) -> Sizes:
    """setReduceConfig and global_memory_size of Reduce.cuh."""
    dims = _coalesced(shape, strides, reduced)
    outputs = inputs = 1
    for length, _, gone in dims:
        if gone:
            inputs *= length
        else:
            outputs *= length
    kept = [d for d in dims if not d[2]]
    gone = [d for d in dims if d[2]]
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
    per_thread = _parts(inputs, step_in)
    across = per_thread >= min(height * 16, 256)
    if across:
        step_in *= height
        per_thread = _parts(inputs, step_in)
    else:
        step_out *= height
    grid = _parts(outputs // vector, step_out)
    target = sms * (threads // (width * height))
    if not across or per_thread < 256 or grid > target:
        return ()
    blocks = max(min(_parts(target, grid), _parts(per_thread, 16)), _parts(per_thread, 256))
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


def _splits(rows: int, sms: int, blocks: int) -> int:
    """num_splits_heuristic of flash_api.cpp."""
    if rows >= 0.8 * sms:
        return 1
    most = min(128, sms, blocks)
    eligible = [n for n in range(1, most + 1) if n == 1 or _parts(blocks, n) != _parts(blocks, n - 1)]
    waves = {n: rows * n / sms for n in eligible}
    efficiency = {n: wave / -(-wave // 1) for n, wave in waves.items()}
    best = max(efficiency.values(), default=0.0)
    return next((n for n in eligible if efficiency[n] >= 0.85 * best), 1)


def _flash_width(width: int) -> int:
    return _up(width, 32 if width <= 128 else 64)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _pow2(n: int) -> int:
    """The largest power of two not above n."""
    return 1 << (max(n, 1).bit_length() - 1)


# By operator: what it takes, one after the other.
OF: dict[Any, tuple[Callable[[Card, tuple[Any, ...], Any], Sizes], ...]] = {
    aten._scaled_dot_product_flash_attention.default: (flash_forward,),
    aten._scaled_dot_product_flash_attention_backward.default: (flash_backward,),
    aten._flash_attention_forward.default: (flash_package_forward,),
    aten._flash_attention_backward.default: (flash_package_backward,),
    aten._scaled_dot_product_efficient_attention.default: (efficient_forward,),
    aten._scaled_dot_product_efficient_attention_backward.default: (
        *(efficient_delta, efficient_backward),
    ),
    aten._scaled_dot_product_cudnn_attention.default: (),
    aten._scaled_dot_product_cudnn_attention_backward.default: (cudnn_backward,),
    aten.embedding_dense_backward.default: (embedding_backward,),
    aten._safe_softmax.default: (safe_softmax,),
    aten._softmax_backward_data.default: (softmax_backward,),
    aten.argmax.default: (argmax,),
    aten.index.Tensor: (index,),
    aten.cumsum.default: (scan,),
    aten.multinomial.default: (multinomial,),
    aten._foreach_norm.Scalar: (foreach_norm,),
    aten.sum.dim_IntList: (reduction,),
    aten.sum.default: (reduction,),
    aten.mean.dim: (reduction,),
    aten.mean.default: (reduction,),
}

# Of these operators' outputs only the first so many are on the card: without dropout the seed and
# the offset of the random numbers are not made (attention.cu).
ON_CARD: dict[Any, int] = {aten._scaled_dot_product_efficient_attention.default: 2}
