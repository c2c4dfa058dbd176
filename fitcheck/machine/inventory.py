"""detect(): every probe in turn, each card with its row of the catalog."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fitcheck.machine import ram
from fitcheck.machine.accelerator import Accelerator, Holder, Machine
from fitcheck.machine.ask import Findings, System

T = TypeVar("T")


def detect(system: System | None = None) -> Machine:
    """What this computer has; never raises. Some milliseconds without a GPU, 0.1 s and more with.

    What a probe could not find out, and why, is in `Machine.notes`.
    """
    system = system or System()
    found = Findings()
    memory = _guarded("RAM", found, partial(ram.ram, system, found))
    cpus = _guarded("processors", found, partial(ram.cpus, system, found))
    for vendor, probe in _probes(system):
        _guarded(vendor, found, partial(probe, system, found))
    cards = [_known(card, found) for card in found.accelerators]
    return Machine(
        accelerators=tuple(card for card in cards if card is not None),
        ram=memory,
        cpus=cpus or 1,
        system=_system_words(system),
        notes=tuple(found.notes),
        raw=tuple(found.raw),
    )


def _probes(system: System) -> Iterator[tuple[str, Callable[[System, Findings], None]]]:
    """Those for this platform; only they are imported, since start-up is a feature."""
    if system.linux or system.windows:
        from fitcheck.machine import nvidia

        yield "NVIDIA", nvidia.probe
    if system.exists("/sys/class/drm"):
        from fitcheck.machine import amd, intel

        yield "AMD", amd.probe
        yield "Intel", intel.probe
    if system.windows:
        from fitcheck.machine import windows

        yield "Windows", windows.probe  # after NVIDIA: it fills in what NVML did not find
    if system.platform == "darwin":
        from fitcheck.machine import apple

        yield "Apple", apple.probe


def best(machine: Machine) -> Accelerator | None:
    """The card with most free memory, with a note when it had to be chosen; None: no card at all.

    An integrated GPU that the catalog does not have comes last: its share of the RAM can exceed the
    memory of the card beside it (llmfit #271).
    """
    cards = machine.accelerators
    if len(cards) < 2:
        return cards[0] if cards else None
    card = max(cards, key=lambda c: (not c.unified or c.gpu is not None, c.free_bytes))
    note = f"of {len(cards)} accelerators this one is judged: it has most free memory"
    return replace(card, notes=(*card.notes, note))


def holders(card: Accelerator, system: System | None = None) -> tuple[Holder, ...]:
    """The other processes that held memory on a card when it was detected, with their names.

    For the screen only: numbers and names of processes stay out of reports.
    """
    system = system or System()
    named = system.host_pids
    return tuple(replace(h, name=_process(h.pid, system) if named else None) for h in card.holders)


def _process(pid: int, system: System) -> str | None:
    """A process's name; None where it has ended or is not ours to know."""
    if system.linux:
        try:
            return system.read(f"/proc/{pid}/comm")
        except OSError:
            return None
    psutil = system.psutil()
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return None


def _guarded(what: str, found: Findings, ask: Callable[[], T]) -> T | None:
    """The answer; whatever fault a strange driver provokes becomes a note with its type.

    The one broad guard: a computer that cannot be read must keep nobody from asking about another,
    and the note is how such a computer becomes known.
    """
    try:
        return ask()
    except Exception as fault:
        found.note(f"{what}: unexpected {type(fault).__name__}: {fault}; please report it")
        return None


def _known(card: Accelerator, found: Findings) -> Accelerator | None:
    """The card with its row of the catalog, which also tells a total that the driver did not."""
    from fitcheck.machine.match import catalog_row  # reads the catalog: only where there is a card

    row = _guarded(card.name, found, partial(catalog_row, card))
    if not card.total_estimated:
        return replace(card, gpu=row)
    if row is None:
        why = "; ".join(card.notes) or "its memory is not told"
        found.note(f"{card.name} is not judged: {why}; nor is it in the catalog")
        return None
    note = f"memory not read: {row.name} as in the catalog"
    total = row.usable_memory().total_bytes
    return replace(card, gpu=row, total_bytes=total, notes=(*card.notes, note))


def _system_words(system: System) -> str:
    """Such as "Linux 6.18.1 x86_64"; no host name."""
    if hasattr(os, "uname"):
        host = os.uname()
        words = f"{host.sysname} {host.release} {host.machine}"
    else:
        import platform

        words = f"{platform.system()} {platform.version()} {platform.machine()}"
    return f"{words} (WSL)" if system.wsl else words
