"""What CUDA kernels allocate for themselves while they run: invisible on `meta`, gone afterwards.

Each function returns the sizes in bytes that one call of an operator holds beside its outputs, in
the order of their allocation. They were recorded from the CUDA build of PyTorch 2.13.0, run on the
host, and agree with it to the byte (tests/test_trace.py); sources are files of that release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fitcheck.bench.reductions import partial_results, parts
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
    """Partial results of keys split to fill the card: flash_api.cpp, set_params_splitkv."""
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
    """As `flash_forward`, of [rows, tokens, heads, D]; rows of all lengths: mha_varlen_fwd."""
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
    """As `flash_backward`, of [rows, tokens, heads, D]; rows of all lengths: mha_varlen_bwd."""
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
    splits = _splits(batch * heads * parts(tokens, 64), 2 * card.sms, parts(keys, block))
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
    """dO x O, and dQ (of wide heads also dK, dV) in fp32 tiles: kernel_backward.h."""
    query, key = args[1], args[2]
    batch, heads, tokens, width = query.shape
    pairs, half = batch * heads, query.element_size() == 2
    tile, keys_tile = _efficient_tiles(card.capability, half, width)
    floats = parts(tokens, tile) * parts(width, keys_tile) * (4 + tile * keys_tile)
    if half and width > 128:
        splits = max(1, min(parts(key.shape[2], keys_tile), 200 // pairs))
        floats += 2 * splits * keys_tile * _up(width, tile)
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
    return partial_results(card, args[0], args[1] if len(args) > 1 else None, 16)


def reduction(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Partial results of blocks, where the rows of one output are shared out: Reduce.cuh."""
    source = args[0]
    dims = args[1] if len(args) > 1 else None
    partial = partial_results(card, source, dims, 4 if source.is_floating_point() else 8)
    if source.is_floating_point() or source.dtype == out.dtype:
        return partial
    return source.numel() * out.element_size(), *partial  # cast first


def logsumexp(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Maxima, and the input less them: ReduceOps.cpp, logsumexp_out_impl."""
    source = args[0]
    return source.element_size() * out.numel(), source.nbytes


def foreach_norm(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """Norms of chunks of 65 536 elements, fp32: ForeachReduceOp.cu."""
    tensors = args[0]
    chunks = max(parts(t.numel(), 65536) for t in tensors)
    return (4 * len(tensors) * chunks,)


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


def scalar(card: Card, args: tuple[Any, ...], out: Any) -> Sizes:
    """A number that is the base of a power, as a tensor: Pow.cpp."""
    return (8,)


def _splits(rows: int, sms: int, blocks: int) -> int:
    """num_splits_heuristic of flash_api.cpp."""
    if rows >= 0.8 * sms:
        return 1
    most = min(128, sms, blocks)
    eligible = [1, *(n for n in range(2, most + 1) if parts(blocks, n) != parts(blocks, n - 1))]
    waves = {n: rows * n / sms for n in eligible}
    efficiency = {n: wave / -(-wave // 1) for n, wave in waves.items()}
    best = max(efficiency.values(), default=0.0)
    return next((n for n in eligible if efficiency[n] >= 0.85 * best), 1)


def _flash_width(width: int) -> int:
    return _up(width, 32 if width <= 128 else 64)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


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
    aten.log_sigmoid_forward.default: (),
    aten.pow.Scalar: (scalar,),
    aten.cumsum.default: (scan,),
    aten.multinomial.default: (multinomial,),
    aten.logsumexp.default: (logsumexp,),
    aten._foreach_norm.Scalar: (foreach_norm,),
    aten.sum.dim_IntList: (reduction,),
    aten.sum.default: (reduction,),
    aten.mean.dim: (reduction,),
    aten.mean.default: (reduction,),
}

# Taken before the outputs are.
BEFORE = (foreach_norm, index)

# Of these operators' outputs only the first so many are on the card: without dropout the seed and
# the offset of the random numbers are not made (attention.cu); log-sigmoid needs no buffer there.
ON_CARD: dict[Any, int] = {
    aten._scaled_dot_product_efficient_attention.default: 2,
    aten.log_sigmoid_forward.default: 1,
}
