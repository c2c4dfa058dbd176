"""What was found: accelerators, RAM, and the machine that holds them. All sizes are bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fitcheck.gpu import GIB, GPU, UsableMemory

# The fields of GPU that a slice of a card has only a part of.
RATES = (
    *("bandwidth_gbs", "bf16_dense_tflops", "fp16_dense_tflops", "fp16_dense_tflops_fp16acc"),
    *("fp32_tflops", "fp8_dense_tflops", "fp4_dense_tflops", "int8_dense_tops"),
)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds memory on a card; bytes is None where the driver does not say."""

    pid: int
    bytes: int | None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One card, one MIG instance, or one GPU that shares the system's RAM."""

    index: int
    """Place among its vendor's cards, in PCI order."""
    name: str
    """As the driver says it."""
    vendor: str
    """nvidia, amd, intel or apple."""
    total_bytes: int
    """What the driver reports, not the marketing number."""
    total_estimated: bool = False
    """The driver did not tell the total; it is the catalog's."""
    reserved_bytes: int | None = None
    """What the driver keeps for itself; None: it does not say, so that is part of `used_bytes`."""
    used_bytes: int = 0
    """What others hold; this process is not among them."""
    unified: bool = False
    """Its memory is the system's RAM."""
    mig: bool = False
    """It is a slice of an NVIDIA card (multi-instance GPU)."""
    uuid: str | None = None
    driver: str | None = None
    """The driver's version."""
    pci_id: str | None = None
    """Device, or device:revision, as in catalog rows: 2684, 744c:c8."""
    compute_capability: tuple[int, int] | None = None
    gfx: str | None = None
    """AMD's name of the instruction set, such as gfx1100."""
    bandwidth_gbs: float | None = None
    """Decimal GB/s, from the live bus width and memory clock where the driver answers."""
    gpu: GPU | None = None
    """The catalog's row for this name and memory; None: the catalog does not have it."""
    holders: tuple[Holder, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def card(self) -> GPU:
        """The catalog's row with the live numbers put in, or the live numbers alone."""
        if self.gpu is None:
            return GPU(
                id=f"this-machine-{self.vendor}-{self.index}",
                name=self.name,
                vendor=self.vendor,
                arch=self.gfx or "unknown",
                segment="unknown",
                memory_gib=self.total_bytes / GIB,
                sources=("the live driver",),
                checked="now",
                total_bytes=self.total_bytes,
                total_verified=True,
                bandwidth_gbs=self.bandwidth_gbs,
                compute_capability=self.compute_capability,
                gfx=self.gfx,
                unified_memory=self.unified,
            )
        row = self.gpu
        if self.mig:  # a slice has a part of the rates, and NVML does not say which
            unknown: dict[str, Any] = dict.fromkeys(RATES)
            row = replace(row, **unknown)
        if not self.total_estimated:
            row = replace(row, total_bytes=self.total_bytes, total_verified=True)
        # An APU's BIOS carve-out is memory of its own, although its catalog row says shared.
        capability = self.compute_capability or row.compute_capability
        return replace(row, unified_memory=self.unified, compute_capability=capability)

    @property
    def usable(self) -> UsableMemory:
        """Driver total - driver reserve - what others hold, and why."""
        card, total = self.card, None if self.total_estimated else self.total_bytes
        used = self.used_bytes
        # Where the driver does not tell them apart (NVML v1, sysfs), `used` has its own share in
        # it; and what macOS keeps from the GPU is where other programs live first.
        untold = self.reserved_bytes is None and not self.unified
        if untold or self.vendor == "apple":
            used = max(0, used - card.usable_memory(total, self.reserved_bytes).reserve_bytes)
        return card.usable_memory(total, self.reserved_bytes, used)

    @property
    def free_bytes(self) -> int:
        """What a new process can have now."""
        return self.usable.usable_bytes


@dataclass(frozen=True, slots=True)
class Ram:
    """System memory, and how much of it this process may have."""

    total_bytes: int
    """What the operating system reports: inside a container usually the host's."""
    available_bytes: int
    """What could be allocated without swapping, limits aside."""
    limit_bytes: int | None = None
    """The smallest cgroup limit among this process's own group and its ancestors."""
    limit_free_bytes: int | None = None
    """What is left under the tightest of these limits."""

    @property
    def usable_bytes(self) -> int:
        if self.limit_free_bytes is None:
            return self.available_bytes
        return min(self.available_bytes, self.limit_free_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """This computer, as far as its own drivers and files tell."""

    accelerators: tuple[Accelerator, ...]
    ram: Ram | None
    """None where it cannot be read, with a note."""
    cpus: int
    """Processors this process may use."""
    system: str
    """Such as "Linux 6.18.1 x86_64"; no host name."""
    notes: tuple[str, ...]
    raw: tuple[tuple[str, str], ...]
    """Each question asked and its answer as it came, for the doctor's report."""
