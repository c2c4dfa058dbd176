"""GPU: what an accelerator is, and how much of its memory a job can really have.

A `GPU` is one row of `catalog/gpus/*.json`, or such a row with what a live driver said put in.

    >>> card = GPU.from_json({"id": "t4", "name": "Tesla T4", "vendor": "nvidia", "arch": "Turing",
    ...     "segment": "datacenter", "memory_gib": 16, "total_bytes": 15360 * 2**20,
    ...     "bandwidth_gbs": 320, "sources": ["nvidia-smi"], "checked": "2026-11-21"})
    >>> card.usable_memory().usable_bytes // 2**20  # 15 360 MiB less the driver's 256
    15104
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fitcheck.errors import FitCheckError

GIB = 2**30
MIB = 2**20

# What a driver reports of a card whose total nobody has logged, as a share of the nominal size.
# The logged NVIDIA and AMD cards lie between 0.94 (ECC in GDDR6) and 1.00.
REPORTED_SHARE = 0.98
# The driver keeps 1 % and at least 256 MiB: NVML's total is 265 to 770 MiB above what a CUDA
# context can use (RTX PRO 6000: 97 887 against 97 249 MiB; T4: 15 360 against 15 095; ollama
# PR 18201 and the notebooks of TRL).
DRIVER_SHARE, DRIVER_LEAST = 0.01, 256 * MIB
# recommendedMaxWorkingSetSize: 2/3 of 32 GB on an M1 Max, 75 % of 64 GB, 84 % of 128 GB on macOS 26
# (antirez/ds4 #893, #909). It grew with macOS, so the live value is always better.
APPLE_LARGE, APPLE_SHARE_LARGE, APPLE_SHARE_SMALL = 36 * GIB, (3, 4), (2, 3)
# Memory shared with Linux (GB10, Jetson, APUs): the system needs 10 GiB and a tenth of the RAM;
# taking more hangs the host (vllm #46307, #56824). A board with less RAM keeps a quarter.
SHARED_SHARE, SHARED_LEAST, SHARED_SMALL = 0.10, 10 * GIB, 0.25


class UsableMemory(NamedTuple):
    """Bytes of one card: what its driver reports, less the driver's own, less other processes'."""

    total_bytes: int
    reserve_bytes: int
    other_bytes: int
    estimated: bool  # the total or the reserve is a rule of thumb, not this card's own number
    why: str

    @property
    def usable_bytes(self) -> int:
        """What a job may fill; never below 0."""
        return max(0, self.total_bytes - self.reserve_bytes - self.other_bytes)


class StreetPrice(NamedTuple):
    """What a card was sold for, in US dollars, at a date."""

    low: float
    high: float
    date: str
    kind: str  # new, used
    source: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GPU:
    """One accelerator as the operating system sees it (a board of two dies is two of them).

    Rates are dense, without structured sparsity; fp16 and bf16 accumulate in fp32. None: unknown.
    `unverified` names the fields that no source read so far confirms: show it beside them.
    """

    id: str
    name: str
    vendor: str  # nvidia, amd, intel, apple
    arch: str
    segment: str  # geforce, radeon, arc, workstation, datacenter, instinct, laptop, apple, ...
    memory_gib: float  # nominal: the GB on the box, which are GiB of memory chips
    sources: tuple[str, ...]
    checked: str
    aliases: tuple[str, ...] = ()
    usual: int | None = None  # rank among namesakes: 1 is the card that the plain name means
    memory_options_gib: tuple[float, ...] = ()  # other sizes sold or modded under this name
    total_bytes: int | None = None  # what the driver reports
    total_verified: bool = False  # that total was seen in a log, or comes from the live driver
    bandwidth_gbs: float | None = None  # decimal GB/s, the peak on paper
    bf16_dense_tflops: float | None = None
    fp16_dense_tflops: float | None = None
    fp16_dense_tflops_fp16acc: float | None = None  # accumulating in fp16: twice, on GeForce
    fp32_tflops: float | None = None
    fp8_dense_tflops: float | None = None
    fp4_dense_tflops: float | None = None
    int8_dense_tops: float | None = None
    tensor_cores: bool = False
    bf16_native: bool = False
    compute_capability: tuple[int, int] | None = None  # NVIDIA
    gfx: str | None = None  # AMD
    sm_count: int | None = None
    gpu_cores: int | None = None  # Apple
    boost_mhz: float | None = None
    tdp_w: float | None = None  # of the whole board
    tgp_range_w: tuple[float, ...] = ()  # laptops: what makers may set
    unified_memory: bool = False  # shares the computer's RAM
    laptop: bool = False
    devices_per_board: int = 1
    interconnect: str = ""  # NVLink, Infinity Fabric, ...; empty: PCIe only
    nvlink_gbs_bidir: float | None = None  # of that interconnect, both directions together
    nvlink_max_gpus: int | None = None
    pcie_gen: float | None = None
    pcie_lanes: int | None = None
    nvml_name: str | None = None
    nvml_name_listed: bool = False  # it is in the name table of NVIDIA's open kernel modules
    pci_device_ids: tuple[str, ...] = ()
    release: str | None = None  # year and month on sale; of GeForce and Radeon recalled
    msrp_usd: float | None = None
    msrp_source: str | None = None
    street_price_usd: tuple[StreetPrice, ...] = ()
    notes: str = ""
    unverified: tuple[str, ...] = ()
    field_sources: tuple[tuple[str, str], ...] = ()  # (field, where its number is from)
    assumed: str = field(default="", compare=False)  # how a name with several meanings was read

    def __repr__(self) -> str:
        return f"<GPU {self.id}>"

    @property
    def short_name(self) -> str:
        """The name without its maker's."""
        name = self.name
        for maker in ("NVIDIA GeForce ", "NVIDIA ", "AMD ", "Intel ", "Apple "):
            name = name.removeprefix(maker)
        return name.removesuffix(" Edition").removesuffix(" Generation")

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> GPU:
        """The GPU of one catalog row; FitCheckError, naming the row, for a missing or odd key."""
        fields = dict(row)
        try:
            for key in _TUPLES & fields.keys():
                fields[key] = tuple(fields[key])
            prices = fields.get("street_price_usd", ())
            fields["street_price_usd"] = tuple(StreetPrice(**price) for price in prices)
            if capability := fields.get("compute_capability"):
                major, minor = capability.split(".")
                fields["compute_capability"] = (int(major), int(minor))
            fields["field_sources"] = tuple(fields.get("field_sources", {}).items())
            return cls(**fields)
        except (AttributeError, TypeError, ValueError) as fault:
            raise FitCheckError(
                f"the GPU row {row.get('id', '(without id)')!r} is malformed: {fault}",
                "compare it with its neighbours in catalog/gpus/",
            ) from fault

    @property
    def doubt(self) -> str:
        """The unverified fields in words, the memory total first; empty when there are none."""
        words = [_DOUBT[key] for key in _DOUBT if key in self.unverified]
        if self.total_bytes is None and not self.unified_memory:
            words.insert(0, "memory")
        return ", ".join(dict.fromkeys(words))

    def usable_memory(
        self,
        total_bytes: int | None = None,
        reserve_bytes: int | None = None,
        other_bytes: int = 0,
    ) -> UsableMemory:
        """Bytes a job may fill on this card, empty unless told otherwise.

        `total_bytes` and `reserve_bytes` are the live driver's (NVML's memory v2; on a Mac the RAM,
        and the RAM less recommendedMaxWorkingSetSize); `other_bytes` is what other processes hold.
        """
        guessed = total_bytes is None and self.total_bytes is None
        total = self.total_bytes if total_bytes is None else total_bytes
        if total is None:
            nominal = int(self.memory_gib * GIB)
            # A Mac reports exactly the memory it was sold with (sysctl hw.memsize).
            total = nominal if self.vendor == "apple" else int(nominal * REPORTED_SHARE)
        why = f"{_grouped(total)} B " + self._whence(guessed, total_bytes is not None)
        rule = ""
        if reserve_bytes is None:
            reserve_bytes, rule = self._reserve(total)
        why += f" - {_grouped(reserve_bytes)} B " + (rule or "reserved, as the driver reports")
        if other_bytes:
            why += f" - {_grouped(other_bytes)} B held by other processes"
        return UsableMemory(total, reserve_bytes, other_bytes, guessed or bool(rule), why)

    def _whence(self, guessed: bool, live: bool) -> str:
        """Where the total comes from, in words."""
        if guessed and self.vendor == "apple":
            return f"({self.memory_gib:g} GiB of RAM)"
        if guessed:
            return f"(estimated: {REPORTED_SHARE} of the nominal {self.memory_gib:g} GiB)"
        if live or self.total_verified:
            return "reported by the driver"
        return "reported by the driver (recalled)"

    def _reserve(self, total: int) -> tuple[int, str]:
        """Estimated bytes that a job cannot have of `total`, and the rule as text."""
        if self.vendor == "apple":
            part, whole = APPLE_SHARE_LARGE if total >= APPLE_LARGE else APPLE_SHARE_SMALL
            rule = f"beyond macOS's limit for the GPU (estimated: {part}/{whole} of the RAM)"
            return total - total * part // whole, rule
        if self.unified_memory:
            least = min(SHARED_LEAST, int(total * SHARED_SMALL))
            rule = (
                "for the system that shares this memory (estimated: 10 %, at least 10 GiB or 1/4)"
            )
            return max(int(total * SHARED_SHARE), least), rule
        rule = "kept by the driver (estimated: 1 %, at least 256 MiB)"
        return max(int(total * DRIVER_SHARE), DRIVER_LEAST), rule


def _grouped(number: int) -> str:
    """1234567 as 1 234 567."""
    return f"{number:,}".replace(",", " ")


_TUPLES = frozenset(
    ("aliases", "memory_options_gib", "tgp_range_w", "pci_device_ids", "sources", "unverified")
)
# Unverified fields that decide an answer, and what to call them in a table.
_DOUBT = {
    "total_bytes": "memory",
    "bandwidth_gbs": "bandwidth",
    "bf16_dense_tflops": "speed",
    "fp16_dense_tflops": "speed",
}
