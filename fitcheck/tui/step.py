"""Memory through one step: a bar for each stage where there is little room, a skyline where enough.

Both end at the usable memory's line; a skyline's stages are as wide as they take time, where the
speed is known.
"""

from __future__ import annotations

from itertools import groupby

from fitcheck.report import Phase, Report
from fitcheck.text import FILLS, REST, gib
from fitcheck.tui.draw import colours
from fitcheck.tui.lines import Line, Span, apart, cut, padded

LEAST_BAR = 10  # columns below which a bar tells nothing
LEAST_NAME = 4  # columns below which a stage's name tells nothing


def stages(report: Report, merged: bool) -> list[tuple[str, list[Phase]]]:
    """The phases of a step; merged: those of one part of it together, such as update.policy."""

    def key(phase: Phase) -> str:
        return stage(phase.name) if merged else phase.name

    return [(name, list(phases)) for name, phases in groupby(report.phases, key)]


def stage(phase: str) -> str:
    """The part of a step that a phase belongs to: update.policy, rollout."""
    first, *rest = phase.split(".")
    return f"{first}.{rest[0]}" if len(rest) > 1 else first


def phase_bars(report: Report, room: int, rows: int) -> list[Line]:
    """A bar for each stage, cut in two by the usable line; ◀ where the peak is."""
    longest = max(len(phase.name) for phase in report.phases)
    merged = len(report.phases) > rows - 1 or room - longest < 10 + LEAST_BAR
    found = stages(report, merged)
    names = max(len(name) for name, _ in found)
    timed = 8 if room - names >= 28 + LEAST_BAR else 0  # columns of the seconds
    space = max(4, room - names - 10 - timed)
    whole = max(report.peak_bytes, report.usable_bytes, 1)
    limit = min(space - 1, round(report.usable_bytes / whole * space))
    worst = report.peak_phase
    lines = [_head(report, room)]
    for name, phases in found:
        size = max(phase.bytes for phase in phases)
        cells = round(size / whole * space)
        over = size > report.usable_bytes
        inside, outside = min(cells, limit), max(0, cells - limit - 1)
        tone = "bad" if over else "c0"
        line = [Span(f"{name:<{names}} "), Span("█" * inside, tone)]
        line.append(Span("·" * (limit - inside), "dim"))
        line.append(Span("╋" if cells > limit else "┃", "mark"))
        line.append(Span("█" * outside, "bad"))
        line.append(Span("·" * (space - limit - 1 - outside), "dim"))
        line.append(Span(f"{gib(size):>7}", "bold" if worst in phases else ""))
        line.append(Span(" ◀" if worst in phases else "  "))
        if timed:
            line.append(Span(f"{_seconds(phases):>8}", "dim"))
        lines.append(line)
    return lines


def skyline(report: Report, room: int, rows: int) -> list[Line]:
    """Memory over time, stacked by component, under the usable line."""
    height, axis = max(4, rows - 3), 6
    columns = max(10, room - axis - 1)
    spans = _widths(report, columns)
    top = max(report.peak_bytes, report.usable_bytes, 1) * 1.02
    limit = height - 1 - min(height - 1, int(report.usable_bytes / top * height))
    lines = [_head(report, room, wide=True)]
    stacks = [_stack(phase, colours(report), top / height) for phase in report.phases]
    for y in range(height):
        level = height - 1 - y
        label = gib(round((level + 0.5) * top / height)) if y % 3 == 0 else ""
        line = [Span(f"{label:>{axis - 1}} ", "dim"), Span("┤" if label else "│", "dim")]
        for span, stack in zip(spans, stacks, strict=True):
            line += _cells(stack, level, span, y == limit)
        if y == limit:
            line.append(Span("◂", "mark"))
        lines.append(line)
    lines.append([Span(" " * axis + "└", "dim"), *_names(report, spans)])
    return lines


def _head(report: Report, room: int, wide: bool = False) -> Line:
    """The heading, and how long a step takes; wide: that the width is that time."""
    head = [Span("MEMORY THROUGH ONE STEP, GiB", "head")]
    if report.speed is None:
        return head
    words = f"{report.speed.step_seconds:.3g} s"
    if wide:
        words = f"width = time, {words} in all"
    return apart(head, [Span(words, "dim")], room)


def _seconds(phases: list[Phase]) -> str:
    known = [phase.seconds for phase in phases if phase.seconds is not None]
    return f"{sum(known):.3g} s" if known else ""


def _widths(report: Report, columns: int) -> list[int]:
    """Columns of each phase: by its seconds where they are known, but at least two."""
    seconds = [phase.seconds or 0.0 for phase in report.phases]
    whole = sum(seconds) or 1.0
    least = min(2, columns // len(seconds))
    if not any(seconds):
        seconds = [1.0] * len(seconds)
        whole = sum(seconds)
    free = columns - least * len(seconds)
    ends, sofar = [], 0.0
    for second in seconds:
        sofar += least + free * second / whole
        ends.append(round(sofar))
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _stack(phase: Phase, order: dict[str, int], unit: float) -> list[int]:
    """The component in each cell of a phase's column, from the bottom; other components: -1."""
    sums: dict[int, int] = {}
    for term in phase.terms:
        place = order.get(term.name, -1)
        sums[place] = sums.get(place, 0) + term.bytes
    cells: list[int] = []
    sofar = 0
    for place in sorted(sums, key=lambda i: i % 99):
        sofar += sums[place]
        cells += [place] * (round(sofar / unit) - len(cells))
    return cells


def _cells(stack: list[int], level: int, span: int, limit: bool) -> Line:
    if level >= len(stack):
        return [Span("╌" * span, "mark")] if limit else [Span(" " * span)]
    place = stack[level]
    fill, style = (FILLS[place], f"c{place}") if place >= 0 else (REST, "c6")
    if limit and span > 1:  # the line stays visible through what exceeds it
        return [Span("╌", "mark"), Span(fill * (span - 1), style)]
    return [Span(fill * span, style)]


def _names(report: Report, spans: list[int]) -> Line:
    """The stages' names below their columns, as far as there is room."""
    line: Line = []
    at = 0
    worst = report.peak_phase
    for name, phases in stages(report, merged=True):
        room = sum(spans[at : at + len(phases)])
        at += len(phases)
        words = cut(name, room - 1) if room > LEAST_NAME else ""
        style = "bold" if worst in phases else "dim"
        line.append(Span(("┬" + padded(words, room - 1))[:room], style))
    return line
