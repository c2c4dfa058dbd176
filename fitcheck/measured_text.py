"""A measurement as text: each phase as predicted and as it happened, and what that proves."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from fitcheck.measured import Measurement, Reading
from fitcheck.report import ALLOCATED, Phase, Report
from fitcheck.text import gib, headline, verdict_lines

MIB = 2**20


def measured_text(
    measured: Measurement,
    estimate: Report | None,
    traced: Report | None,
    width: int = 80,
    colour: bool = False,
    explain: bool = False,
) -> str:
    """One screen: the verdict, the table of phases, how fast, what was and was not verified."""
    parts = [
        textwrap.wrap(f"{headline(measured.report.plan)}, measured on {measured.run.card}", width),
        verdict_lines(measured.report, width, colour),
        phase_table(measured, estimate, traced),
        *([memory_table(measured.readings)] if explain else []),
        _labelled(facts(measured, estimate, traced), width),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def phase_table(measured: Measurement, estimate: Report | None, traced: Report | None) -> list[str]:
    """Peak allocated of each phase on the three rungs, and how fast it went."""
    guess, dry = allocated(estimate), allocated(traced)
    head = ("estimate", "dry run", "measured", "off", "s", "tok/s")
    lines = [f"{'Peak allocated, MiB':<{NAME}}" + "".join(map(str.rjust, head, _WIDTHS))]
    whole = measured.oom is None and measured.run.steps > 0
    for reading in measured.readings:
        seen = reading.peak_allocated_bytes
        tokens = reading.tokens_per_second
        lines.append(
            _row(reading.phase, guess.get(reading.phase), dry.get(reading.phase), seen, whole)
            + f"{reading.seconds:8.2f}"
            + (f"{tokens:11,.0f}" if tokens else "")
        )
    if whole:
        said, dried = (r.allocated_bytes if r else None for r in (estimate, traced))
        row = _row("whole step", said, dried, measured.report.allocated_bytes)
        lines.append(row + f"{measured.run.seconds:8.2f}")
    return [line.rstrip() for line in lines]


NAME = 22  # the longest: update.policy.backward
_WIDTHS = (10, 10, 10, 9, 8, 11)


def _row(name: str, guess: int | None, dry: int | None, seen: int, comparable: bool = True) -> str:
    cells = [f"{size / MIB:,.1f}" if size else "-" for size in (guess, dry, seen)]
    best = dry or guess
    cells.append(f"{100 * (best / seen - 1):+.1f} %" if best and seen and comparable else "-")
    return f"{name:<{NAME}}" + "".join(map(str.rjust, cells, _WIDTHS))


def allocated(report: Report | None) -> dict[str, int]:
    """Peak allocated by phase."""
    return {p.name: _peak(p) for p in report.phases} if report else {}


def _peak(phase: Phase) -> int:
    return max(moment.part(ALLOCATED) for moment in phase.moments)


def memory_table(readings: tuple[Reading, ...]) -> list[str]:
    """All that was read of memory, phase by phase."""
    head = ("held", "reserved", "peak", "peak res", "card", "outside")
    lines = [f"{'Memory, MiB':<{NAME}}" + "".join(word.rjust(9) for word in head)]
    for r in readings:
        sizes = (r.allocated_bytes, r.reserved_bytes, r.peak_allocated_bytes)
        rest = (r.peak_reserved_bytes, r.used_bytes, r.outside_bytes)
        cells = ("-" if size is None else f"{size / MIB:,.0f}" for size in (*sizes, *rest))
        lines.append(f"{r.phase:<{NAME}}" + "".join(cell.rjust(9) for cell in cells))
    return lines


def facts(
    measured: Measurement, estimate: Report | None, traced: Report | None
) -> Iterator[tuple[str, str]]:
    """(label, sentence): what ran, how fast, what is proven by it and what is not."""
    run = measured.run
    made = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    yield "Ran", f"{run.steps} steps of {run.seconds:.2f} s after {run.warmup} to warm up; {made}"
    if speeds := list(_speeds(measured, estimate)):
        yield "Speed", "; ".join(speeds)
    if outside := [r.outside_bytes for r in measured.readings if r.outside_bytes is not None]:
        used = max(r.used_bytes or 0 for r in measured.readings)
        text = f"{gib(max(outside))} GiB outside the allocator (context, libraries)"
        yield "Card", f"{text}; {gib(used)} GiB in use on the whole card, by its driver"
    elif run.on_card:
        yield "Card", "no driver library answers: what lies outside the allocator is not measured"
    for name, report in (("Estimate", estimate), ("Dry run", traced)):
        if report is not None:
            yield name, _against(measured, report)
    for note in measured.report.notes:
        yield "Note", note


def _against(measured: Measurement, predicted: Report) -> str:
    """How a prediction stands up to what happened."""
    said = f"said {predicted.card_verdict}, {gib(predicted.peak_bytes)} GiB"
    if measured.oom is not None or not measured.run.steps:
        return said
    seen = {r.phase: r.peak_allocated_bytes for r in measured.readings}
    offs = {
        name: size / seen[name] - 1 for name, size in allocated(predicted).items() if seen.get(name)
    }
    if not offs:
        return said
    worst = max(offs, key=lambda name: abs(offs[name]))
    total = predicted.allocated_bytes / measured.report.allocated_bytes - 1
    kept = predicted.reserved_bytes / measured.report.reserved_bytes - 1
    return (
        f"{said}; peak allocated {100 * total:+.2f} %, reserved {100 * kept:+.2f} % off what was "
        f"measured; the worst phase {100 * offs[worst]:+.2f} % ({worst})"
    )


def _speeds(measured: Measurement, estimate: Report | None) -> Iterator[str]:
    if not measured.run.on_card or not measured.run.steps:
        return  # the card's rates say nothing of what ran elsewhere
    updates: dict[str, float] = {}
    for reading in measured.readings:
        if reading.mfu is not None:
            updates[reading.phase.rpartition(".")[0]] = reading.mfu
        if reading.bandwidth is not None:
            share = 100 * reading.bandwidth
            yield f"{reading.phase} reads at {share:.0f} % of the card's bandwidth"
    said = sum(p.seconds or 0.0 for p in estimate.phases if p.name != "load") if estimate else 0
    if said:
        yield f"the estimate said {said:.2f} s a step"
    for update, mfu in updates.items():
        yield f"{update} at {100 * mfu:.0f} % MFU"


def _labelled(lines: Iterator[tuple[str, str]], width: int) -> list[str]:
    found = []
    for label, text in lines:
        head = f"{label:<9}"
        found += textwrap.wrap(head + text, width, subsequent_indent=" " * 9)
    return found
