"""Intel cards through sysfs: the xe and i915 drivers, which tell the total and nothing else."""

from __future__ import annotations

from dataclasses import replace

from fitcheck.machine.accelerator import Accelerator
from fitcheck.machine.ask import Findings, System
from fitcheck.machine.ram import with_shared_memory
from fitcheck.machine.sysfs import DrmCard, drm_cards

VENDOR = "0x8086"
INTEGRATED_SLOT = "0000:00:02.0"
# PCI device -> name (pci.ids 2023.04.11; Battlemage and Lunar Lake from later lists of it; e223,
# Battlemage G31, is recalled as the B70).
NAMES = {
    **dict.fromkeys(("0bd5", "0bd6"), "Intel Data Center GPU Max 1550"),
    **dict.fromkeys(("0bd9", "0bda", "0bdb"), "Intel Data Center GPU Max 1100"),
    "5690": "Intel Arc A770M",
    "56a0": "Intel Arc A770",
    "56a1": "Intel Arc A750",
    "56a2": "Intel Arc A580",
    "56a5": "Intel Arc A380",
    "56a6": "Intel Arc A310",
    "56b3": "Intel Arc Pro A60",
    "64a0": "Intel Arc 140V",
    "e20b": "Intel Arc B580",
    "e20c": "Intel Arc B570",
    "e211": "Intel Arc Pro B60",
    "e212": "Intel Arc Pro B50",
    "e223": "Intel Arc Pro B70",
}
USED_NOTE = "what others hold on it only root can read (debugfs): not subtracted"


def probe(system: System, found: Findings) -> None:
    """Write down every Intel card, and the integrated GPUs that the catalog has."""
    for index, card in enumerate(drm_cards(system, found, VENDOR)):
        if card.slot != INTEGRATED_SLOT:
            found.accelerators.append(_discrete(system, found, index, card))
        elif card.device in NAMES:
            found.accelerators.append(with_shared_memory(_card(index, card), system))
        else:
            found.note(f"an integrated Intel GPU ({card.device}) shares the RAM: not judged")


def _discrete(system: System, found: Findings, index: int, card: DrmCard) -> Accelerator:
    tiles = [name for name in system.names(card.path) if name.removeprefix("tile").isdigit()]
    # xe: physical size of each tile, what the firmware keeps included.
    sizes = [found.number(system, f"{card.path}/{t}/physical_vram_size_bytes") for t in tiles]
    total = sum(size or 0 for size in sizes)
    if not total:  # Intel's own build of i915; the kernel's has no such file
        total = found.number(system, f"{card.folder}/lmem_total_bytes") or 0
    return replace(
        _card(index, card), total_bytes=total, total_estimated=not total, notes=(USED_NOTE,)
    )


def _card(index: int, card: DrmCard) -> Accelerator:
    return Accelerator(
        index=index,
        name=NAMES.get(card.device, f"Intel GPU {card.device}"),
        vendor="intel",
        total_bytes=0,
        total_estimated=True,
        driver=card.driver or None,
        pci_id=card.device,
    )
