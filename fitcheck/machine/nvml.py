"""One visit to NVML: each card's name, memory, processes and clocks.

Every call has its own guard: which of them answer depends on the driver's age, on WSL, MIG and the
chip (nvml-wrapper #51 and #57, nvitop #208, pynvml PR 48, nvidia-container-toolkit #842).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fitcheck.machine.accelerator import Accelerator, Holder
from fitcheck.machine.ask import Findings, System
from fitcheck.machine.ram import with_shared_memory
from fitcheck.machine.visible import mig_uuids, short_uuid, visible

# What NVML's return codes mean to whoever reads them (nvml.h, nvmlReturn_t).
REFUSALS = {
    3: "NotSupported: the driver does not answer this",
    4: "NoPermission: the driver refuses; in a container, pass the device through (--gpus all)",
    6: "NotFound: there is no such device",
    9: "DriverNotLoaded: the kernel module is not loaded; install the driver or reboot",
    12: "LibraryNotFound: libnvidia-ml is not there; install the NVIDIA driver",
    13: "FunctionNotFound: the driver is too old for this question",
    15: "GpuIsLost: the GPU has fallen off the bus; reboot",
    18: "LibRmVersionMismatch: the driver was updated while the old kernel module runs; reboot",
    999: "Unknown: the driver failed without saying why",
}
NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND = 3, 4, 13
MEMORY_V2 = 0x02000028  # nvmlMemory_v2 says what is reserved; drivers before 510 do not know it
MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
ADDRESSING_ATS = 2  # NVML_DEVICE_ADDRESSING_MODE_ATS: the host's memory is the card's too
MEMORY_CLOCK = 2  # NVML_CLOCK_MEM
WDDM = 0  # NVML_DRIVER_WDDM: Windows manages the card's memory
GB10_PCI = 0x2E1210DE  # device 2e12 of vendor 10de
# NVML of a card that Windows manages does not know all that Windows keeps: 1.1 of 23.8 GiB (3090),
# 3.2 of 22 (2080 Ti), 1.1 of 8 (4060 laptop, WSL), 2 of 12 (3060) (ollama #8723, #9167, #11015).
WDDM_NOTE = "Windows keeps more of this card than NVML says: 5 to 17 % was seen, not subtracted"


def refusal(code: int) -> str:
    return REFUSALS.get(code, f"NVML error {code}")


@dataclass(frozen=True, slots=True)
class Device:
    """A card or MIG instance as NVML hands it out."""

    index: int
    handle: Any
    parent: Any = None  # the card's handle, for a MIG instance


@dataclass(slots=True)
class Session:
    """Remembers every answer for the report, and why the last question was refused."""

    nvml: Any
    system: System
    found: Findings
    where: str = "NVML"
    refused: int = 0

    def ask(self, call: str, *arguments: Any, show: Callable[[Any], str] | None = str) -> Any:
        """The answer of one call, or None with the code in `refused`.

        `show` words the answer for the report; None keeps it out.
        """
        answer, self.refused = None, 0
        mismatch = getattr(self.nvml, "NVMLLibraryMismatchError", ())
        try:
            if hasattr(self.nvml, call):
                answer = getattr(self.nvml, call)(*arguments)
            else:  # an nvidia-ml-py older than the call
                self.refused = FUNCTION_NOT_FOUND
        except self.nvml.NVMLError as error:
            self.refused = error.value
        except mismatch:  # nvidia-ml-py's word for a driver older than the call
            self.refused = FUNCTION_NOT_FOUND
        if self.refused:
            self.found.raw.append((f"{self.where} {call}", f"({refusal(self.refused)})"))
        elif show is not None:
            self.found.raw.append((f"{self.where} {call}", show(answer)))
        return answer

    def write_down_cards(self) -> None:
        driver = self.ask("nvmlSystemGetDriverVersion")
        count = self.ask("nvmlDeviceGetCount")
        if count is None:
            self.found.note(f"NVIDIA: cards cannot be counted: {refusal(self.refused)}")
        cards = []
        for device in self.devices(count or 0):
            if card := self.accelerator(device):
                cards.append(replace(card, driver=driver))
        self.found.accelerators += visible(cards, self.system, self.found)

    def devices(self, count: int) -> Iterator[Device]:
        """Every card, or its MIG instances where it is divided.

        Then the instances that only the environment names: a container may open these although it
        may not list their card's.
        """
        seen: list[str] = []
        for index in range(count):
            self.where = f"card {index}"
            handle = self.ask("nvmlDeviceGetHandleByIndex", index, show=None)
            if handle is None:
                self.found.note(f"NVIDIA card {index}: {refusal(self.refused)}")
                continue
            slices = list(self.slices(index, handle))
            seen += [self.ask("nvmlDeviceGetUUID", s.handle, show=None) or "" for s in slices]
            yield from slices or [Device(index, handle)]
        for uuid in mig_uuids(self.system.env):
            if any(name.startswith(uuid) for name in seen):
                continue
            self.where = short_uuid(uuid)
            handle = self.ask("nvmlDeviceGetHandleByUUID", uuid, show=None)
            if handle is None:
                self.found.note(f"NVIDIA {self.where}: {refusal(self.refused)}")
                continue
            parent = self.ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, show=None)
            yield Device(self.ask("nvmlDeviceGetIndex", parent) or 0, handle, parent or handle)

    def slices(self, index: int, handle: Any) -> Iterator[Device]:
        """The MIG instances of a card; none where it is whole."""
        mode = self.ask("nvmlDeviceGetMigMode", handle)
        if mode is None or mode[0] != MIG_ENABLED:
            return
        for place in range(self.ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            part = self.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, place, show=None)
            if part is not None:  # NotFound is an empty place
                yield Device(index, part, handle)

    def accelerator(self, device: Device) -> Accelerator | None:
        """The card with what NVML says of it; None, with a note, where its memory stays unknown."""
        handle, card = device.handle, device.parent or device.handle
        self.where = f"card {device.index}" + (" MIG" if device.parent else "")
        name = self.ask("nvmlDeviceGetName", handle) or self.ask("nvmlDeviceGetName", card)
        uuid = self.ask("nvmlDeviceGetUUID", handle, show=short_uuid)
        pci = self.ask("nvmlDeviceGetPciInfo", card, show=lambda info: f"{info.pciDeviceId:#010x}")
        capability = self.ask("nvmlDeviceGetCudaComputeCapability", card)
        accelerator = Accelerator(
            index=device.index,
            name=name or "NVIDIA GPU",
            vendor="nvidia",
            total_bytes=0,
            total_estimated=True,
            mig=device.parent is not None,
            uuid=uuid,
            pci_id=f"{pci.pciDeviceId >> 16:04x}" if pci else None,
            compute_capability=tuple(capability) if capability else None,
            bandwidth_gbs=None if device.parent else self.bandwidth_gbs(card),
        )
        return self.with_memory(accelerator, device, pci.pciDeviceId if pci else 0)

    def with_memory(self, card: Accelerator, device: Device, pci: int) -> Accelerator | None:
        memory = self.memory(device.handle)
        why, refused = refusal(self.refused), self.refused
        ats = self.ask("nvmlDeviceGetAddressingMode", device.handle) == ADDRESSING_ATS
        jetson = card.name.endswith("(nvgpu)")  # its NVML memory is missing or partial (nvgpu #37)
        if jetson or (refused == NOT_SUPPORTED and (ats or pci == GB10_PCI or "GB10" in card.name)):
            return with_shared_memory(card, self.system)
        if memory is None and (refused == NO_PERMISSION or card.mig):
            # A divided card whose instances this container was not given.
            self.found.note(f"NVIDIA card {card.index} ({card.name}): memory: {why}")
            return None
        if memory is None:
            return replace(card, notes=(f"NVML does not tell its memory ({why})",))
        total, reserved, used = memory
        holders = self.holders(device.handle, total)
        if self.system.host_pids:
            used -= sum(h.bytes or 0 for h in holders if h.pid == os.getpid())
            holders = [holder for holder in holders if holder.pid != os.getpid()]
        notes = []
        if ats:
            notes.append("the host's memory is coherent with it (ATS) and not counted")
        if self.system.wsl or self.windows_manages(device.handle):
            notes.append(WDDM_NOTE)
        return replace(
            card,
            total_bytes=total,
            total_estimated=False,
            reserved_bytes=reserved,
            used_bytes=max(0, used),
            holders=tuple(holders),
            notes=tuple(notes),
        )

    def memory(self, handle: Any) -> tuple[int, int | None, int] | None:
        """(total, reserved, used); reserved None: inside used. None: refused."""
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle, MEMORY_V2, show=_memory_words)
        if memory is not None:
            parts = memory.reserved + memory.free + memory.used
            # Driver 535 changed a struct under old clients (pynvml PR 48): then the sum is off.
            if memory.total and abs(memory.total - parts) <= memory.total // 100:
                return memory.total, memory.reserved, memory.used
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle, show=_memory_words)
        if memory is None or not memory.total:
            self.refused = self.refused or NOT_SUPPORTED
            return None
        return memory.total, None, memory.used

    def holders(self, handle: Any, total: int) -> list[Holder]:
        """Processes with memory on the card, the largest first."""
        held: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):  # one process may be in both lists, with one number
            call = f"nvmlDeviceGet{kind}RunningProcesses"
            processes = self.ask(call, handle, show=_process_words)
            if processes is None and self.refused == FUNCTION_NOT_FOUND:
                processes = self.ask(f"{call}_v2", handle, show=_process_words)
            for process in processes or ():
                size = process.usedGpuMemory  # None under WDDM; more than all: pynvml PR 48
                known = size if size is not None and size <= total else None
                held[process.pid] = max(filter(None, (held.get(process.pid), known)), default=known)
        rows = (Holder(pid, size) for pid, size in held.items())
        return sorted(rows, key=lambda holder: -(holder.bytes or 0))

    def bandwidth_gbs(self, handle: Any) -> float | None:
        """Bus width x 2 x memory clock / 8: 384 bit at 9751 MHz is 936 GB/s (forum 198730)."""
        bits = self.ask("nvmlDeviceGetMemoryBusWidth", handle)
        mhz = self.ask("nvmlDeviceGetMaxClockInfo", handle, MEMORY_CLOCK)
        return bits * 2 * mhz / 8 / 1000 if bits and mhz else None

    def windows_manages(self, handle: Any) -> bool:
        if not self.system.windows:
            return False
        return bool(self.ask("nvmlDeviceGetCurrentDriverModel", handle) == WDDM)


def _memory_words(memory: Any) -> str:
    keys = ("total", "reserved", "free", "used")
    return " ".join(f"{key}={getattr(memory, key)}" for key in keys if hasattr(memory, key))


def _process_words(processes: Any) -> str:
    """Sizes only: process numbers and names are nobody else's business."""
    return str([process.usedGpuMemory for process in processes])
