"""Measurements that are on record: this machine's own, and those nearest to a plan.

for row in nearest(plan):
    print(row.model, row.measured_bytes, row.error("estimate"))
"""

from __future__ import annotations

from fitcheck import accuracy, archive
from fitcheck.accuracy import Comparison
from fitcheck.plan import Plan
from fitcheck.text import gib
from fitcheck.timings import SOURCE
from fitcheck.tui.lines import Line, Span, cut_inside, padded

MOST = 8  # rows of a list


def nearest(plan: Plan, count: int = 4) -> list[Comparison]:
    """The recorded runs that share most with a plan: method, tuning, precision, model, card."""

    def shared(row: Comparison) -> int:
        settings = row.settings.split(", ")
        return (
            8 * (row.method == plan.method)
            + 4 * (plan.tuning in settings)
            + 2 * (row.model == plan.model.name)
            + (plan.precision in settings)
            + (row.card == plan.gpu.name)
        )

    found = [row for row in accuracy.comparisons() if row.measured_bytes]
    return sorted(found, key=lambda row: -shared(row))[:count]


def own_runs() -> list[tuple[str, archive.File]]:
    """(file name, content) of what `fitcheck bench` or this screen saved, the newest first."""
    found = []
    for path in archive.folder().glob("*.json"):
        content = archive.read(path)
        if content.source == SOURCE and content.runs:
            found.append((path.stem, content))
    return sorted(found, key=lambda item: item[1].checked, reverse=True)


def nearest_lines(found: list[Comparison], plan: Plan, room: int) -> list[Line]:
    """A row for each, with how far off the estimate is of it."""
    lines: list[Line] = [[Span(" NEAREST ON RECORD, PEAK ALLOCATED GiB", "head")]]
    if all(row.method != plan.method for row in found):
        lines.append([Span(f" no measurement of {plan.method} is on record yet", "dim")])
    for row in found:
        assert row.measured_bytes is not None
        off = row.error("estimate")
        words = f"{row.model}, {row.method}, {row.settings}"
        line = [Span(f" {padded(cut_inside(words, room - 24), room - 24)}")]
        line.append(Span(f"{gib(row.measured_bytes):>8}", "bold"))
        line.append(Span(f"{100 * off:>+8.1f} %" if off is not None else f"{'-':>10}", "dim"))
        lines.append(line)
    return lines


def own_lines(found: list[tuple[str, archive.File]], room: int) -> list[Line]:
    """This machine's runs, the newest first."""
    lines: list[Line] = [[Span(" SAVED HERE", "head")]]
    if not found:
        lines.append([Span(" nothing yet: b measures, s saves it", "dim")])
    for _, content in found[:MOST]:
        run = content.runs[0]
        words = f"{content.checked}  {run.plan['method']} of {run.plan['model']}"
        peak, guess = run.measured.allocated_bytes, run.predicted.get("estimate")
        line = [Span(f" {padded(cut_inside(words, room - 24), room - 24)}")]
        line.append(Span(f"{gib(peak) if peak else run.measured.outcome or '-':>8}", "bold"))
        if peak and guess:
            line.append(Span(f"{100 * (guess.allocated_bytes / peak - 1):>+8.1f} %", "dim"))
        lines.append(line)
    return lines
