"""The display cards that Linux lists under /sys/class/drm, whoever made them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fitcheck.machine.ask import Findings, System

DRM = "/sys/class/drm"


@dataclass(frozen=True, slots=True)
class DrmCard:
    """One card: its drm folder (/sys/class/drm/card1), PCI slot (0000:03:00.0), id and driver."""

    folder: str
    slot: str
    device: str
    driver: str

    @property
    def path(self) -> str:
        """The folder of the PCI device."""
        return f"{self.folder}/device"


def drm_cards(system: System, found: Findings, vendor: str) -> Iterator[DrmCard]:
    """A vendor's cards (0x1002 AMD, 0x8086 Intel) in PCI order."""
    cards = []
    for name in system.names(DRM):
        if not name.removeprefix("card").isdigit():  # also there: connectors, render nodes
            continue
        path = f"{DRM}/{name}/device"
        if _first_line(system, f"{path}/vendor") != vendor:
            continue
        device = found.text(system, f"{path}/device") or ""
        lines = found.text(system, f"{path}/uevent") or ""
        event = dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)
        slot, driver = event.get("PCI_SLOT_NAME", ""), event.get("DRIVER", "")
        cards.append(DrmCard(f"{DRM}/{name}", slot, device.removeprefix("0x").lower(), driver))
    yield from sorted(cards, key=lambda card: card.slot)


def _first_line(system: System, path: str) -> str:
    """Empty where it cannot be read: many a display device has no PCI vendor."""
    try:
        return system.read(path).partition("\n")[0]
    except OSError:
        return ""
