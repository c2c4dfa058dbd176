"""What CUDA decides by itself: which attention kernel runs, and the memory that kernels hide.

Recorded from the CUDA build of PyTorch 2.13.0 (operators, kernel choice and allocator run on a host
without a GPU), unless a line says otherwise.
"""

from __future__ import annotations

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
    """The kernel that scaled_dot_product_attention picks: flash, cudnn, efficient, math or eager."""
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


def attention_backward(kernel: str, rows: int, length: int, heads: int, kv_heads: int, dim: int) -> int:
    """Hidden bytes of the backward of one attention call."""
    if kernel in ("flash", "cudnn"):
        long, wide = up(length, 128), up(dim, 32 if dim <= 128 else 64)
        expanded = 2 * rows * length * heads * dim * 2 if kv_heads != heads else 0
        return 4 * rows * long * heads * wide + 4 * rows * heads * long + expanded
    return 4 * rows * length * heads * dim + 4 * rows * heads * length  # fp32 dQ and delta


def embedding_backward(tokens: int, width: int) -> int:
    """embedding_dense_backward sorts more than 3072 indices, and sums their gradients in fp32."""
    return 4 * tokens * width if tokens > 3072 else 0
