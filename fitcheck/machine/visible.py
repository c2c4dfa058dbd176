"""CUDA_VISIBLE_DEVICES: which cards a CUDA program started here would see, and in what order."""

from __future__ import annotations

from collections.abc import Mapping

from fitcheck.machine.accelerator import Accelerator
from fitcheck.machine.ask import Findings, System

KEY = "CUDA_VISIBLE_DEVICES"
# NVIDIA's container runtime reads the second one; inside, its indices are the host's and mean
# nothing, but a MIG instance it names can be opened.
MIG_KEYS = (KEY, "NVIDIA_VISIBLE_DEVICES")


def short_uuid(uuid: str) -> str:
    """Enough to tell cards apart, too little to tell whose: GPU-8932f937."""
    kind, _, rest = uuid.partition("-")
    return f"{kind}-{rest[:8]}" if rest else kind[:12]


def mig_uuids(env: Mapping[str, str]) -> list[str]:
    """The MIG instances that the environment names."""
    names = (name.strip() for key in MIG_KEYS for name in env.get(key, "").split(","))
    return list(dict.fromkeys(name for name in names if name.startswith("MIG-")))


def visible(cards: list[Accelerator], system: System, found: Findings) -> list[Accelerator]:
    """The cards that CUDA_VISIBLE_DEVICES leaves, in its order; all where it is not set.

    As in CUDA, a name that fits no card hides itself and all that follow.
    """
    wish = system.env.get(KEY)
    if wish is None:
        return cards
    found.raw.append((KEY, ",".join(short_uuid(name.strip()) for name in wish.split(","))))
    names = [name.strip() for name in wish.split(",")]
    chosen: list[Accelerator] = []
    for name in names:
        fits = [card for card in cards if _is(card, name) and card not in chosen]
        if not fits:
            break
        chosen += fits
    if hidden := len(cards) - len(chosen):
        found.note(f"{KEY}={found.raw[-1][1]} hides {hidden} of {len(cards)} NVIDIA cards")
    mixed = len({card.name for card in cards}) > 1
    in_pci_order = system.env.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if mixed and not in_pci_order and any(name.isdigit() for name in names):
        found.note(
            f"{KEY} is read in PCI order; CUDA's own order is fastest first unless "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID is set [recalled]"
        )
    return chosen


def _is(card: Accelerator, name: str) -> bool:
    if name.isdigit():
        return card.index == int(name)
    return bool(name) and card.uuid is not None and card.uuid.startswith(name)
