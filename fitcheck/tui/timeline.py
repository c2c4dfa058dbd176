"""The dry run's timeline: memory over the events of a step, stacked by role, under the limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fitcheck.text import gib
from fitcheck.tui.lines import Line, Span, apart, cut, padded, width
from fitcheck.tui.step import stage

ROLES = ("policy", "reference", "reward", "critic")
FILLS = dict(zip((*ROLES, "step"), "█▓▒░▞", strict=True))
BETWEEN = "-"  # the mark of what lies between phases


@dataclass(frozen=True, slots=True)
class Timeline:
    """samples: (event, bytes by role), at most some hundred; marks: (event, the phase that begins).

    limit_bytes: what the allocator may take; oom: the event at which memory runs out under it.
    """

    samples: tuple[tuple[int, Mapping[str, int]], ...]
    marks: tuple[tuple[int, str], ...]
    limit_bytes: int
    oom: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Timeline:
        """What the subprocess says."""
        return cls(
            tuple((event, dict(roles)) for event, roles in values["samples"]),
            tuple((event, name) for event, name in values["marks"]),
            values["limit_bytes"],
            values["oom"],
        )

    def phase(self, event: int) -> str:
        """The phase of an event."""
        found = ""
        for begin, name in self.marks:
            if begin > event:
                break
            found = name if name != BETWEEN else found
        return found


def columns(timeline: Timeline, room: int) -> list[tuple[int, Mapping[str, int]]]:
    """The fullest sample of each of so many columns."""
    samples = timeline.samples
    count = min(room, len(samples))
    found = []
    for i in range(count):
        part = samples[i * len(samples) // count : (i + 1) * len(samples) // count]
        found.append(max(part, key=lambda sample: sum(sample[1].values())))
    return found


def timeline_lines(timeline: Timeline, room: int, rows: int) -> list[Line]:
    """The stacked columns, the limit across them, the phases below, and a legend."""
    axis = 7
    height = max(4, rows - 3)
    found = columns(timeline, max(8, room - axis - 2))
    totals = [sum(roles.values()) for _, roles in found]
    top = max([*totals, timeline.limit_bytes if _drawn(timeline, totals) else 0, 1]) * 1.04
    limit = int(timeline.limit_bytes / top * height)
    stacks = [_stack(roles, top / height) for _, roles in found]
    lines = [_legend(timeline, totals, room)]
    for level in reversed(range(height)):
        label = gib(round((level + 0.5) * top / height)) if level % 3 == 1 else ""
        line = [Span(f"{label:>{axis - 1}} ", "dim"), Span("┤" if label else "│", "dim")]
        line += _row(timeline, found, stacks, level, level == limit)
        lines.append(line)
    return [*lines, [Span(" " * axis + "└", "dim"), *_phases(timeline, found)]]


def _drawn(timeline: Timeline, totals: list[int]) -> bool:
    """A limit far above would flatten the picture: it is told, not drawn."""
    return timeline.limit_bytes <= 3 * max([*totals, 1])


def _stack(roles: Mapping[str, int], unit: float) -> list[str]:
    cells: list[str] = []
    sofar = 0
    for role in (*ROLES, "step"):
        sofar += sum(s for name, s in roles.items() if (name if name in ROLES else "step") == role)
        cells += [role] * (round(sofar / unit) - len(cells))
    return cells


def _row(
    timeline: Timeline,
    found: list[tuple[int, Mapping[str, int]]],
    stacks: list[list[str]],
    level: int,
    limit: bool,
) -> Line:
    """One level of all columns; neighbours of one style are one span."""
    line: Line = []
    for (event, _), stack in zip(found, stacks, strict=True):
        if timeline.oom is not None and event > timeline.oom:
            cell = Span("╌" if limit else " ", "mark" if limit else "")
        elif level < len(stack):
            role = stack[level]
            cell = Span("╍" if limit else FILLS[role], "mark" if limit else style_of(role))
        else:
            cell = Span("╌", "mark") if limit else Span(" ")
        if line and line[-1].style == cell.style:
            line[-1] = Span(line[-1].text + cell.text, cell.style)
        else:
            line.append(cell)
    return line


def style_of(role: str) -> str:
    """The colour of a role."""
    return f"c{list(FILLS).index(role)}"


def _legend(timeline: Timeline, totals: list[int], room: int) -> Line:
    present = {role if role in ROLES else "step" for _, roles in timeline.samples for role in roles}
    line: Line = []
    for role, fill in FILLS.items():
        if role in present:
            line += [Span(f" {fill} ", style_of(role)), Span(role)]
    said = f"peak {gib(max([*totals, 0]))}, the allocator may take {gib(timeline.limit_bytes)} GiB"
    return apart(line, [Span(f"{said} ", "mark")], room)


def _phases(timeline: Timeline, found: list[tuple[int, Mapping[str, int]]]) -> Line:
    """The phases' names below their columns, as far as there is room."""
    line: Line = []
    names = [stage(timeline.phase(event)) for event, _ in found]
    at = 0
    while at < len(names):
        end = at
        while end < len(names) and names[end] == names[at]:
            end += 1
        room = end - at
        words = cut(names[at], room - 1) if room > 4 else ""
        line.append(Span(("┬" + padded(words, room - 1))[:room], "dim"))
        at = end
    assert width(line) == len(names)
    return line
