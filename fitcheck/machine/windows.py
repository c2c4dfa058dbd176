"""AMD and Intel cards on Windows, from the display drivers' registry keys.

Win32_VideoController.AdapterRAM and HardwareInformation.MemorySize have 32 bits: a 32 GB R9700
shows as 8 (llmfit #830), an Arc A770 as 2 (oshi #2907). qwMemorySize has 64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fitcheck.machine.accelerator import Accelerator
from fitcheck.machine.ask import Findings, System

SIZE = "HardwareInformation.qwMemorySize"
VENDORS = {"1002": "amd", "8086": "intel", "10de": "nvidia"}
INTEGRATED_BYTES = 2 * 2**30  # a fixed aperture of an integrated GPU, not the memory it can use
NOTES = (
    "from the registry: what others hold is unknown and not subtracted",
    "an entry may be of a card no longer there [recalled]",
)


def probe(system: System, found: Findings) -> None:
    """Write down the cards that NVML did not."""
    try:
        adapters = system.display_registry()
    except OSError as error:
        found.note(f"the registry's display adapters cannot be read: {error.strerror}")
        return
    seen = {card.vendor for card in found.accelerators}
    for values in adapters:
        card = _accelerator(values, found)
        if card is not None and card.vendor not in seen:
            index = sum(other.vendor == card.vendor for other in found.accelerators)
            found.accelerators.append(replace(card, index=index))


def _accelerator(values: dict[str, Any], found: Findings) -> Accelerator | None:
    """The card of one key; None for virtual displays and integrated GPUs."""
    name, size = str(values.get("DriverDesc", "")), values.get(SIZE)
    identity = str(values.get("MatchingDeviceId", "")).lower()
    found.raw.append((f"registry {name}", f"{SIZE}={size!r} MatchingDeviceId={identity}"))
    if isinstance(size, bytes):  # some drivers write REG_BINARY
        size = int.from_bytes(size, "little")
    parts = dict(
        part.split("_", 1) for part in identity.replace("\\", "&").split("&") if "_" in part
    )
    vendor = VENDORS.get(parts.get("ven", ""))
    if vendor is None or not isinstance(size, int) or size <= 0:
        return None
    if vendor != "nvidia" and size < INTEGRATED_BYTES:
        found.note(f"{name} has {size // 2**20} MiB of its own and shares the RAM: not judged")
        return None
    device, revision = parts.get("dev"), parts.get("rev")
    return Accelerator(
        index=0,
        name=name,
        vendor=vendor,
        total_bytes=size,
        driver=str(values.get("DriverVersion", "")) or None,
        pci_id=f"{device}:{revision}" if device and revision else device,
        notes=NOTES,
    )
