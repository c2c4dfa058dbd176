"""How long cards take to tell each other: ring collectives over the slowest link.

    all_reduce(gradient_bytes, 8, link_bandwidth(gpu, 8))     # seconds

Bytes each card sends, for n cards and S bytes: all-reduce 2 (n-1)/n S, all-gather and
reduce-scatter (n-1)/n S (NVIDIA/nccl-tests, doc/PERFORMANCE.md, "Bus bandwidth").
"""

from __future__ import annotations

from fitcheck.gpu import GPU

# What a PCIe lane carries one way, GB/s after encoding, by generation (PCI-SIG); of it a card
# gets about 0.8 in large copies (assumed: packet headers and flow control take the rest).
PCIE_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
PCIE_SHARE = 0.8


def all_reduce(size: float, gpus: int, bandwidth: float) -> float:
    """Seconds until every card holds the sum of all cards' `size` bytes."""
    return 2 * all_gather(size, gpus, bandwidth)


def all_gather(size: float, gpus: int, bandwidth: float) -> float:
    """Seconds until every card holds all `size` bytes, of which each had a part.

    A reduce-scatter, the same way back, takes as long.
    """
    return (gpus - 1) / gpus * size / bandwidth


def host_bandwidth(gpu: GPU) -> float:
    """Bytes a second between card and host, one way; PCIe 4.0 x16 where the row names none."""
    if gpu.unified_memory:
        return (gpu.bandwidth_gbs or 100.0) * 1e9
    lane = PCIE_LANE[int(gpu.pcie_gen or 4)]
    return lane * (gpu.pcie_lanes or 16) * PCIE_SHARE * 1e9


def link_name(gpu: GPU, gpus: int) -> str:
    """How cards in one machine are joined, in words: NVLink, or PCIe; assumed where not known."""
    if _has_nvlink(gpu, gpus):
        return "NVLink"
    assumed = "" if gpu.pcie_gen and gpu.pcie_lanes else " (assumed)"
    return f"PCIe {gpu.pcie_gen or 4:g} x{gpu.pcie_lanes or 16}{assumed}"


def _has_nvlink(gpu: GPU, gpus: int) -> bool:
    return bool(gpu.nvlink_gbs_bidir) and gpus <= (gpu.nvlink_max_gpus or 2)


def link_bandwidth(gpu: GPU, gpus: int) -> float:
    """Bytes a second that a card sends to its neighbour in one machine: NVLink's, or PCIe's."""
    if gpu.nvlink_gbs_bidir and _has_nvlink(gpu, gpus):
        return gpu.nvlink_gbs_bidir / 2 * 1e9
    return host_bandwidth(gpu)
