"""`fitcheck machine`: what was found, as text, as JSON, and as a report to paste into an issue."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fitcheck.machine.accelerator import Accelerator, Machine, Ram
from fitcheck.machine.ask import System
from fitcheck.machine.inventory import best, detect, holders

GIB = 2**30
PACKAGES = ("nvidia-ml-py", "psutil", "torch")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command `machine`, whose `run` takes the arguments and returns the exit status."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "machine",
        help="what this computer has",
        description="What this computer has, how much of its memory is usable, and why.",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one JSON object")
    shape.add_argument(
        "--doctor",
        action="store_true",
        help="print every raw answer, to paste into an issue; it names neither you nor this host",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what `detect` found; always 0, since a computer without a GPU is no mistake."""
    machine = detect()
    if args.json:
        print(json.dumps(as_json(machine), indent=2))
    else:
        print(doctor(machine) if args.doctor else describe(machine))
    return 0


def describe(machine: Machine, system: System | None = None) -> str:
    """What was found, what of it is usable and why; for a terminal."""
    lines = [f"{machine.system}, {machine.cpus} processors"]
    chosen = best(machine)
    for card in machine.accelerators:
        lines += ["", *_card_lines(card, _processes(card, system))]
    if not machine.accelerators:
        lines += ["", "No GPU was found; --gpu NAME judges one of the catalog."]
    elif chosen and len(machine.accelerators) > 1:
        lines += ["", f"Judged: {chosen.name} ({chosen.vendor} {chosen.index}), most free memory"]
    lines += ["", *_ram_lines(machine.ram)]
    if machine.notes:
        lines += ["", "Notes", *(f"  {note}" for note in machine.notes)]
    return "\n".join(lines)


def _card_lines(card: Accelerator, processes: str) -> list[str]:
    memory, row = card.usable, card.gpu
    facts = [f"{card.vendor} {card.index}"]
    if card.compute_capability:
        facts.append("compute capability {}.{}".format(*card.compute_capability))
    facts += [card.gfx] if card.gfx else []
    facts += [f"driver {card.driver}"] if card.driver else []
    facts += ["memory shared with the system"] if card.unified else []
    guess = " (estimated)" if memory.estimated else ""
    lines = [
        f"{card.name} ({', '.join(facts)})",
        _row("total", memory.total_bytes, guess if card.total_estimated else ""),
        _row("reserved", memory.reserve_bytes, "" if card.total_estimated else guess),
        _row("others", memory.other_bytes, processes),
        _row("usable", memory.usable_bytes, ""),
        f"  {'why':<9} " + memory.why.replace(" - ", f"\n{'':<12}- "),
    ]
    if row is None:
        lines.append(f"  {'catalog':<9} not in it: no speed estimates")
    else:
        doubt = f" (unverified: {row.doubt})" if row.doubt else ""
        lines.append(f"  {'catalog':<9} {row.id}{doubt}")
    if card.bandwidth_gbs:
        lines.append(f"  {'bandwidth':<9} {card.bandwidth_gbs:,.0f} GB/s by its live clocks")
    return lines + [f"  {'note':<9} {note}" for note in card.notes]


def _row(label: str, size: int, remark: str) -> str:
    return f"  {label:<9} {_gib(size):>11}{remark}"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"


def _processes(card: Accelerator, system: System | None) -> str:
    """The holders by name, the largest first: "  python 1.90 GiB, Xorg 0.12 GiB"."""
    shown = []
    for holder in holders(card, system):
        size = "" if holder.bytes is None else f" {_gib(holder.bytes)}"
        shown.append(f"{holder.name or 'a process'}{size}")
    return "  " + ", ".join(shown) if shown else ""


def _ram_lines(ram: Ram | None) -> list[str]:
    if ram is None:
        return ["RAM unknown"]
    lines = ["RAM", _row("total", ram.total_bytes, "")]
    lines.append(_row("available", ram.available_bytes, ""))
    if ram.limit_bytes is not None and ram.limit_free_bytes is not None:
        lines.append(_row("limit", ram.limit_bytes, "  by cgroup"))
        lines.append(_row("left", ram.limit_free_bytes, "  under the tightest cgroup limit"))
    return [*lines, _row("usable", ram.usable_bytes, "")]


def as_json(machine: Machine) -> dict[str, Any]:
    """Plain data for scripts; processes are counted, not named."""
    chosen = best(machine)
    ram = machine.ram
    return {
        "system": machine.system,
        "cpus": machine.cpus,
        "ram": None
        if ram is None
        else {
            "total_bytes": ram.total_bytes,
            "available_bytes": ram.available_bytes,
            "limit_bytes": ram.limit_bytes,
            "usable_bytes": ram.usable_bytes,
        },
        "accelerators": [_card_json(card) for card in machine.accelerators],
        "judged": None if chosen is None else f"{chosen.vendor} {chosen.index}",
        "notes": list(machine.notes),
    }


def _card_json(card: Accelerator) -> dict[str, Any]:
    memory, capability = card.usable, card.compute_capability
    return {
        "index": card.index,
        "name": card.name,
        "vendor": card.vendor,
        "uuid": card.uuid,
        "gpu": card.gpu.id if card.gpu else None,
        "total_bytes": memory.total_bytes,
        "reserve_bytes": memory.reserve_bytes,
        "other_bytes": memory.other_bytes,
        "usable_bytes": memory.usable_bytes,
        "estimated": memory.estimated,
        "why": memory.why,
        "other_processes": len(card.holders),
        "unified": card.unified,
        "mig": card.mig,
        "driver": card.driver,
        "compute_capability": "{}.{}".format(*capability) if capability else None,
        "gfx": card.gfx,
        "bandwidth_gbs": card.bandwidth_gbs,
        "notes": list(card.notes),
    }


def doctor(machine: Machine) -> str:
    """Every question and its raw answer, to paste into an issue.

    Without what identifies: no host, user, process or path of a home; card UUIDs are cut short.
    """
    version = getattr(sys.modules["fitcheck"], "__version__", "(unknown)")
    lines = [f"FitCheck {version} machine report", f"python {sys.version.split()[0]}"]
    lines.append(f"{machine.system}, {machine.cpus} processors")
    lines += [f"{package} {_version(package)}" for package in PACKAGES]
    lines += ["", "Answers"]
    for question, answer in machine.raw:
        lines.append(f"  {question}: {' | '.join(answer.splitlines())}")
    lines += ["", "Conclusions"]
    for card in machine.accelerators:
        lines += [f"  {line}" for line in _card_lines(card, f"  processes: {len(card.holders)}")]
    lines += [f"  {line}" for line in _ram_lines(machine.ram)]
    lines += ["", "Notes", *(f"  {note}" for note in machine.notes)]
    return _without_names("\n".join(lines))


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _without_names(text: str) -> str:
    """The last fence: a driver's complaint may quote a path or a host."""
    import platform

    host, home = platform.node(), str(Path.home())
    if len(home) > len("/root"):  # "/" and "/root" tell nothing
        text = text.replace(home, "~")
    if len(host) > 3:  # a shorter one would cut up other words
        text = text.replace(host, "(host)")
    return text
