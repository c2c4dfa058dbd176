"""What CUDA decides by itself: which attention kernel runs, and the memory that kernels hide.

Recorded from the CUDA build of PyTorch 2.13.0 (operators, kernel choice and allocator run on a host
without a GPU), unless a line says otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fitcheck.gpu import GPU

MIB = 2**20
# Context and loaded kernels, outside the allocator: 256 MiB on an RTX 3090 (torch 2.7.1, cu128) to
# 426 MiB on an RTX 6000 Ada (torch 2.10, cu130), 492 MiB on an 80 GB card (InvokeAI #9413, #9447,
# unsloth-zoo #1053); growth while running adds to it, so the default stands at the upper end.
CONTEXT = 450 * MIB


def cublas_workspace(gpu: GPU) -> int:
    """Taken from the allocator at the first matrix product and kept (CUDABlas handle pool)."""
    if gpu.compute_capability is None:
        return 32 * MIB if gpu.vendor == "amd" else 0
    return 32 * MIB if gpu.compute_capability[0] >= 9 else 8_519_680


def attention_kernel(gpu: GPU, dtype: str, masked: bool, dim: int, choice: str) -> str:
    """What scaled_dot_product_attention picks: flash, cudnn, efficient, math or eager."""
    if choice != "sdpa":
        return choice
    major = gpu.compute_capability[0] if gpu.compute_capability else 8
    old = gpu.compute_capability is not None and gpu.compute_capability < (8, 0)
    if (dtype == "bf16" and old) or (old and dim > 256):
        return "math"
    if dtype == "fp32" or dim > 256:
        return "efficient"
    if major in (9, 10):
        return "cudnn"
    return "efficient" if masked or old else "flash"


def attention_known(gpu: GPU, kernel: str) -> str:
    """Why the memory of this kernel is not certain; empty when it is."""
    if kernel == "cudnn":
        return "cuDNN attention's own workspace is not known; flash attention's stands in for it"
    if gpu.vendor == "amd":
        return "attention on AMD is taken to need what it needs on an NVIDIA card"
    return ""


def up(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


class Card(NamedTuple):
    """What of a card decides how kernels split their work. Defaults: an A100."""

    capability: tuple[int, int] = (8, 0)
    sms: int = 108  # streaming multiprocessors

    @property
    def threads(self) -> int:
        """Resident threads of one multiprocessor: CUDA C++ programming guide, technical specs."""
        if self.capability == (7, 5):
            return 1024
        return 1536 if self.capability in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1)) else 2048


def card(gpu: GPU) -> Card:
    """The card that kernels see; where a row does not say, an A100 stands in."""
    return Card(gpu.compute_capability or (8, 0), gpu.sm_count or 108)


class Call(NamedTuple):
    """One call of attention: rows x heads x length queries, against `reach` keys."""

    rows: int
    length: int
    reach: int
    heads: int
    kv_heads: int
    dim: int  # of queries and keys
    out_dim: int  # of values
    size: int  # bytes per element


def attention_forward(kernel: str, call: Call, card: Card) -> int:
    """Hidden bytes of one attention call."""
    rows, length, reach, heads, kv_heads, dim, out_dim, size = call
    if kernel == "efficient":  # the output in fp32 where registers do not hold it: kernel_forward.h
        return 4 * rows * heads * length * out_dim if size == 2 and max(dim, out_dim) > 128 else 0
    if length == 1 and heads > kv_heads:  # seqlenq_ngroups_swapped of flash_api.cpp
        heads, length = kv_heads, heads // kv_heads
    block = 256 if dim <= 64 else 128 if dim <= 128 else 64
    splits = _splits(rows * heads * -(-length // 64), 2 * card.sms, -(-reach // block))
    # Partial outputs and their log-sums, where the keys are split to fill the card.
    return 0 if splits == 1 else 4 * splits * rows * heads * length * (1 + _flash_width(dim))


def attention_backward(kernel: str, call: Call, card: Card) -> int:
    """Hidden bytes of the backward of one attention call."""
    rows, length, reach, heads, kv_heads, dim, out_dim, size = call
    if kernel == "efficient":
        kernels = 4 * rows * heads * (length + _efficient_floats(call, card))
        # dO x O of fp32 is made beforehand, not by the kernel: attention_backward.cu
        return max(kernels, 4 * rows * heads * length * (out_dim + 2)) if size == 4 else kernels
    # dO x O and dQ in fp32, dK and dV for every query head: flash_api.cpp, mha_bwd
    expanded = 2 * rows * reach * heads * dim * size if kv_heads != heads else 0
    return 4 * rows * heads * up(length, 128) * (1 + _flash_width(dim)) + expanded


def _flash_width(dim: int) -> int:
    return up(dim, 32 if dim <= 128 else 64)


@lru_cache(maxsize=1024)
def _splits(blocks: int, sms: int, keys: int) -> int:
    """num_splits_heuristic of flash_api.cpp: into how many parts the keys are split."""
    if blocks >= 0.8 * sms:
        return 1
    best, found = 0.0, {}
    for n in range(1, min(128, sms, keys) + 1):
        if n == 1 or -(-keys // n) != -(-keys // (n - 1)):
            waves = blocks * n / sms
            found[n] = waves / -(-waves // 1)
            best = max(best, found[n])
    return next(n for n, efficiency in found.items() if efficiency >= 0.85 * best)


def _efficient_floats(call: Call, card: Card) -> int:
    """fp32 tiles of dQ, of wide heads also of dK and dV: workspace_size of kernel_backward.h."""
    half, dim = call.size == 2, max(call.dim, call.out_dim)
    ampere = card.capability >= (8, 0)
    tile, keys = 128, 128  # queries and keys of one tile, by the order of kernels/cutlassB.h
    if dim <= 64 or (not half and not ampere):
        tile, keys = 64, 64
    elif not half or dim > 128 or not ampere or (dim <= 96 and card.capability in ((8, 6), (8, 9))):
        keys = 64
    floats = -(-call.length // tile) * -(-call.dim // keys) * (4 + tile * keys)
    if half and dim > 128:
        parts = max(1, min(-(-call.reach // keys), 200 // (call.rows * call.heads)))
        floats += parts * keys * (up(call.dim, tile) + up(call.out_dim, tile))
    return floats


@lru_cache(maxsize=1024)
def reduction(count: int, width: int, card: Card) -> int:
    """Partial sums of `count` rows of `width` added up: setReduceConfig of Reduce.cuh.

    The gradients of norms' weights and of biases are such sums over all tokens.
    """
    vector = 4
    while width % vector:
        vector //= 2
    most, lanes = 512 // vector, width // vector
    wide, high = min(_pow2(lanes), most), min(_pow2(count), most)
    block = min(wide, 32)
    rows = min(high, most // block)
    block = min(wide, most // rows)
    if count < min(rows * 16, 256):
        return 0
    each, grid = -(-count // rows), -(-lanes // block)
    target = card.sms * (card.threads // (block * rows))
    if each < 256 or grid > target:
        return 0
    blocks = max(min(-(-target // grid), -(-each // 16)), -(-each // 256))
    return 0 if blocks == 1 else 4 * width * blocks * block * vector + 4 * grid


def _pow2(n: int) -> int:
    """The largest power of two not above n."""
    return 1 << (n.bit_length() - 1)


def embedding_backward(tokens: int, width: int, rows: int) -> int:
    """Sorted ids and partial sums, above 3 072 tokens: EmbeddingBackwardKernel.cu."""
    if tokens <= 3072:
        return 0
    distinct = min(tokens, rows)
    partial = tokens // 10 + distinct  # NROWS_PER_THREAD
    return 3 * 8 * tokens + 2 * 8 * distinct + (8 + 4 * width) * partial
