"""Other people's computers for the tests of fitcheck.machine: files, environments, a fake NVML.

world = World(tmp_path).load("strix_halo")     # tests/fixtures/machine/strix_halo.json
machine = detect(world.system())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fitcheck.machine import Accelerator, Machine, System

FIXTURES = Path(__file__).parent / "fixtures" / "machine"
GIB, MIB = 2**30, 2**20
MEMINFO = "MemTotal: 65536000 kB\nMemFree: 10000000 kB\nMemAvailable: 50000000 kB\n"
# A DGX Spark at the instant of llamastash #80: CUDA said 2.77 GiB were free.
GB10_BYTES = int(121.7 * 2**20) * 1024
GB10_MEMINFO = (
    f"MemTotal: {GB10_BYTES // 1024} kB\nMemFree: {int(2.77 * 2**20)} kB\n"
    f"MemAvailable: {52 * 2**20} kB\n"
)
HOST_PIDS = "pid:[4026531836]"


def refuse(*_: object) -> Any:
    raise AssertionError("this world must not be asked that")


def no_such_command(command: Sequence[str]) -> str:
    raise FileNotFoundError(command[0])


class World:
    """A file system under tmp_path, and the System that looks at it."""

    def __init__(self, root: Path, linux: bool = True) -> None:
        self.root = root
        if linux:
            self.write("/proc/meminfo", MEMINFO)

    def load(self, name: str) -> World:
        """The files of a fixture."""
        for path, text in json.loads((FIXTURES / f"{name}.json").read_text())["files"].items():
            self.write(path, text)
        return self

    def write(self, path: str, text: str = "") -> World:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n")
        return self

    def with_nvidia_driver(self) -> World:
        self.write("/proc/driver/nvidia/version", "NVRM version: 580.95.05")
        place = self.root / "proc/self/ns/pid"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(HOST_PIDS)
        return self

    def system(self, *, nvml: Any = refuse, **changes: Any) -> System:
        """`nvml` is a FakeNvml, or what to call in place of importing it."""
        ask = nvml if callable(nvml) else lambda: nvml
        defaults: dict[str, Any] = {"platform": "linux", "env": {}, "run": no_such_command}
        rest = {"psutil": refuse, "load_library": refuse, "display_registry": refuse}
        return System(root=self.root, nvml=ask, **(defaults | rest | changes))


def only(machine: Machine) -> Accelerator:
    """The one accelerator of a machine that has one."""
    (card,) = machine.accelerators
    return card


class Psutil:
    """psutil, as far as it is asked."""

    def __init__(self, total: int, available: int) -> None:
        self.total, self.available = total, available

    def virtual_memory(self) -> Psutil:
        return self


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value


class NVMLLibraryMismatchError(Exception):
    """What nvidia-ml-py raises for a driver older than the call."""


@dataclass(eq=False)
class Card:
    """A card, or a MIG instance, as NVML would describe it. Sizes in bytes."""

    name: str = "NVIDIA GeForce RTX 4090"
    total: int = 24564 * MIB
    reserved: int = 430 * MIB
    used: int = 0
    uuid: str = "GPU-aaaaaaaa-1111-2222-3333-444444444444"
    pci: int = 0x268410DE
    capability: tuple[int, int] = (8, 9)
    bus_bits: int = 384
    memory_mhz: int = 10501
    addressing: int | None = None
    driver_model: int | None = None
    compute: Sequence[tuple[int, int | None]] = ()
    graphics: Sequence[tuple[int, int | None]] = ()
    slices: Sequence[Card | None] = ()  # MIG instances; None: an empty place
    index: int = 0
    refusals: dict[str, int] = field(default_factory=dict)  # call -> NVML code


class FakeNvml:
    """Answers like the module pynvml; `init` is the code with which nvmlInit fails."""

    NVMLError = NVMLError
    NVMLLibraryMismatchError = NVMLLibraryMismatchError

    def __init__(self, *cards: Card, init: int = 0, absent: Iterable[str] = ()) -> None:
        self.cards, self.init, self.absent = cards, init, set(absent)
        self.open = 0
        self.calls: list[str] = []
        for index, card in enumerate(cards):
            card.index = index

    def __getattr__(self, call: str) -> Callable[..., Any]:
        answer = getattr(FakeNvml, f"_{call}", None)
        if answer is None or call in self.absent:
            raise AttributeError(call)

        def ask(*arguments: Any) -> Any:
            self.calls.append(call)
            if arguments and isinstance(arguments[0], Card):
                name = f"{call}_v2" if call.endswith("MemoryInfo") and arguments[1:] else call
                code = arguments[0].refusals.get(name, 0)
                if code == -1:
                    raise NVMLLibraryMismatchError(call)
                if code:
                    raise NVMLError(code)
            return answer(self, *arguments)

        return ask

    def _nvmlInit(self) -> None:
        if self.init:
            raise NVMLError(self.init)
        self.open += 1

    def _nvmlShutdown(self) -> None:
        self.open -= 1

    def _nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def _nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        card = self.cards[index]
        if code := card.refusals.get("nvmlDeviceGetHandleByIndex"):
            raise NVMLError(code)
        return card

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        for card in self.cards:
            for part in filter(None, card.slices):
                if part.uuid.startswith(uuid):
                    return part
        raise NVMLError(6)

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: Card) -> Card:
        return next(card for card in self.cards if part in card.slices)

    def _nvmlDeviceGetIndex(self, card: Card) -> int:
        return card.index

    def _nvmlDeviceGetName(self, card: Card) -> str:
        return card.name

    def _nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def _nvmlDeviceGetPciInfo(self, card: Card) -> Any:
        return SimpleNamespace(pciDeviceId=card.pci)

    def _nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:
        return card.capability

    def _nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        return [1, 1] if card.slices else [0, 0]

    def _nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return len(card.slices)

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, place: int) -> Card:
        if part := card.slices[place]:
            return part
        raise NVMLError(6)

    def _nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> Any:
        free = card.total - card.reserved - card.used
        if version is None:  # v1 counts the driver's share as used
            used = card.used + card.reserved
            return SimpleNamespace(total=card.total, free=free, used=used)
        assert version == 0x02000028
        return SimpleNamespace(
            version=version, total=card.total, reserved=card.reserved, free=free, used=card.used
        )

    def _nvmlDeviceGetAddressingMode(self, card: Card) -> int:
        if card.addressing is None:
            raise NVMLError(3)
        return card.addressing

    def _nvmlDeviceGetCurrentDriverModel(self, card: Card) -> int:
        if card.driver_model is None:
            raise NVMLError(3)
        return card.driver_model

    def _nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in card.compute]

    _nvmlDeviceGetComputeRunningProcesses_v2 = _nvmlDeviceGetComputeRunningProcesses

    def _nvmlDeviceGetGraphicsRunningProcesses(self, card: Card) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in card.graphics]

    def _nvmlDeviceGetMemoryBusWidth(self, card: Card) -> int:
        return card.bus_bits

    def _nvmlDeviceGetMaxClockInfo(self, card: Card, kind: int) -> int:
        assert kind == 2  # NVML_CLOCK_MEM
        return card.memory_mhz
