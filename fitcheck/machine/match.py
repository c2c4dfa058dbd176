"""Which row of the catalog a card is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.gpu import GIB, GPU
from fitcheck.machine.accelerator import Accelerator


def catalog_row(card: Accelerator) -> GPU | None:
    """By the driver's name and memory, since one name can be several cards; else by its PCI id.

    Names can be generic: a reflashed MI50 is an "AMD Radeon Graphics" (llmfit #638). None: the
    catalog does not have it.
    """
    total = None if card.mig or card.total_estimated else card.total_bytes  # a slice's is its own
    for name in (card.name.partition(" MIG")[0], *_names_by_pci_id(card)):
        try:
            row = catalog.find_gpu(name, total)
        except FitCheckError:
            continue
        if row.vendor == card.vendor:  # never a namesake from elsewhere
            return row
    return None


def _names_by_pci_id(card: Accelerator) -> list[str]:
    """At most one name: of the rows with this PCI id, that of the nearest memory."""
    if card.pci_id is None:
        return []
    rows = catalog.rows(f"gpus/{card.vendor}.json", "gpus")
    found = [row for row in rows if card.pci_id in row.get("pci_device_ids", ())]
    if not found:  # an unlisted revision: then device and memory must leave one card only
        device = card.pci_id.partition(":")[0] + ":"
        found = [
            row for row in rows if any(i.startswith(device) for i in row.get("pci_device_ids", ()))
        ]
        found = [row for row in found if _miss(row, card) < 0.1]
        if len(found) != 1:
            return []
    return [min(found, key=lambda row: _miss(row, card))["name"]]


def _miss(row: Mapping[str, Any], card: Accelerator) -> float:
    """How far the card's memory is from the row's, as a share of it."""
    return abs(card.total_bytes / GIB - float(row["memory_gib"])) / float(row["memory_gib"])
