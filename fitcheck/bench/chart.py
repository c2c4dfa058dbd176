"""The pieces of a memory timeline, as SVG: areas, lines, labels, legend.

`fitcheck.bench.timeline` puts them together.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby, pairwise

from fitcheck.bench.samples import Sample, column_starts, fullest

WIDTH, LEFT, RIGHT, TOP, HEIGHT = 1000, 64, 888, 92, 300  # px; the plot from LEFT to RIGHT
BOTTOM = TOP + HEIGHT
LABEL_ROWS = 3  # phase names above the plot
ROW = 15  # px
CHAR = 6.2  # px, a character of the font at 11 px, on average
MIB, GIB = 1024**2, 1024**3
BETWEEN = "-"  # the name of what lies between phases

# The first seven after Okabe and Ito's palette for colour-blind readers, a little lighter.
COLOURS = (
    *("#6db1dc", "#efb54f", "#5cb893", "#de8658", "#d79cbf", "#efe07a", "#4f7cab"),
    *("#9b8ac4", "#8fb04e", "#c9ae8a", "#a8a29e"),
)
INK, FAINT, GRID, ALARM = "#1c1917", "#6b6560", "#e7e5e4", "#c2261b"


class Chart:
    """The samples by column, and the pieces of the picture drawn from them."""

    def __init__(
        self,
        samples: Sequence[tuple[int, Mapping[str, int]] | Sample],
        marks: Sequence[tuple[int, str]],
        length: int | None,
        limit: int | None,
    ) -> None:
        ordered = [Sample(*sample) for sample in samples] or [Sample(0, {})]
        self.length = length or ordered[-1].event + 1
        # Of several marks at one event the last one counts: the others are of phases without any.
        self.marks = sorted({i: name for i, name in marks if i < self.length}.items())
        self.starts = column_starts(self.length, self.marks)
        self.columns = fullest(ordered, self.starts, self.length)
        self.totals = [sample.total for sample in self.columns]
        self.reserved = [sample.reserved for sample in self.columns]
        self.peak = self.totals.index(max(self.totals))
        self.roles = self._stacking_order()
        self.limit = limit
        highest = max(*self.totals, *self.reserved, 1)
        # A limit far above would flatten the picture: it is told, not drawn.
        self.limit_is_drawn = limit is not None and limit <= 3 * highest
        self.top = 1.06 * max(highest, limit if limit and self.limit_is_drawn else 0)
        self.legend_bottom = BOTTOM

    def _stacking_order(self) -> list[str]:
        """What comes once and stays at the bottom, first come first; what comes and goes on top."""
        restless = {}
        for role in {role: None for sample in self.columns for role in sample.roles}:
            held = [sample.roles.get(role, 0) for sample in self.columns]
            if most := max(held):
                change = sum(abs(after - before) for before, after in pairwise(held))
                first = next(i for i, size in enumerate(held) if size)
                restless[role] = (round(change / most), first)
        return sorted(restless, key=restless.__getitem__)

    def x(self, column: int) -> float:
        return LEFT + (RIGHT - LEFT) * column / len(self.columns)

    def y(self, size: float) -> float:
        return BOTTOM - HEIGHT * size / self.top

    def column_of(self, index: int) -> int:
        return bisect_left(self.starts, index)

    def grid(self) -> list[str]:
        step = _step(self.top)
        lines = []
        for i in range(int(self.top / step) + 1):
            y = self.y(i * step)
            lines.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{GRID}"/>')
            label = f"{i * step / (GIB if step >= GIB / 4 else MIB):g}"
            lines.append(text(LEFT - 8, y + 4, label, f'text-anchor="end" fill="{FAINT}"'))
        unit = "GiB" if step >= GIB / 4 else "MiB"
        lines.append(text(LEFT - 8, TOP - 10, unit, f'text-anchor="end" fill="{FAINT}"'))
        return lines

    def areas(self) -> list[str]:
        base = [0] * len(self.columns)
        paths = []
        for role, colour in self.colours():
            edge = [low + s.roles.get(role, 0) for low, s in zip(base, self.columns, strict=True)]
            outline = self._steps(edge, "M") + self._steps(base, "L", backwards=True)
            paths.append(
                f'<path d="{outline}Z" fill="{colour}"><title>{escape(role)}</title></path>'
            )
            base = edge
        return paths

    def colours(self) -> list[tuple[str, str]]:
        return [(role, COLOURS[i % len(COLOURS)]) for i, role in enumerate(self.roles)]

    def _steps(self, sizes: Sequence[int], start: str, backwards: bool = False) -> str:
        """A staircase through the columns, from left to right or back; equal steps in one."""
        runs = []
        column = 0
        for size, run in groupby(sizes):
            width = len(list(run))
            runs.append((self.x(column), self.x(column + width), self.y(size)))
            column += width
        if backwards:
            runs = [(right, left, y) for left, right, y in reversed(runs)]
        begin = f"{start}{runs[0][0]:.1f} {runs[0][2]:.1f}"
        return begin + "".join(f"V{y:.1f}H{to:.1f}" for _, to, y in runs)

    def reserved_line(self) -> list[str]:
        if not any(self.reserved):
            return []
        path = self._steps(self.reserved, "M")
        return [f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.2"/>']

    def phases(self) -> list[str]:
        """A line where each phase begins, and its name above if one of three rows has room."""
        lines: list[str] = []
        names: list[str] = []
        ends = [0.0] * LABEL_ROWS
        for index, name in self.marks:
            x = self.x(self.column_of(index))
            rows = [] if name == BETWEEN else [r for r, end in enumerate(ends) if end <= x]
            row = rows[0] if rows else None
            top = TOP if row is None else TOP - 2 - ROW * (row + 1)
            lines.append(f'<path d="M{x:.1f} {top}V{BOTTOM}" stroke="{FAINT}" stroke-width=".7"/>')
            if row is not None:
                room = min(int((WIDTH - x - 8) / CHAR), 30)
                short = name if len(name) <= room else name[: room - 1] + "…"
                ends[row] = x + CHAR * len(short) + 10
                names += _haloed(x + 4, TOP - 6 - ROW * row, short)
        return lines + names

    def limit_line(self) -> list[str]:
        if self.limit is None or not self.limit_is_drawn:
            return []
        y = self.y(self.limit)
        return [
            f'<path d="M{LEFT} {y:.1f}H{RIGHT + 6}" stroke="{ALARM}" stroke-width="1.5" '
            'stroke-dasharray="6 3"/>',
            text(RIGHT + 10, y - 1, "limit", f'fill="{ALARM}" font-weight="600"'),
            text(RIGHT + 10, y + 12, readable(self.limit), f'fill="{ALARM}" font-weight="600"'),
        ]

    def peak_label(self) -> list[str]:
        size = self.totals[self.peak]
        x = (self.x(self.peak) + self.x(self.peak + 1)) / 2
        y = self.y(size)
        label = f"peak {readable(size)}"
        place = _beside(x) + ' font-weight="600"'
        return [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{INK}" stroke="#ffffff"/>',
            *_haloed(_aside(x), y - 5, label, place),
        ]

    def oom_line(self, oom: int | None) -> list[str]:
        if oom is None:
            return []
        x = self.x(self.column_of(min(oom, self.length)))
        label = f'{_beside(x)} fill="{ALARM}" font-weight="600"'
        return [
            f'<path d="M{x:.1f} {TOP}V{BOTTOM}" stroke="{ALARM}" stroke-width="2"/>',
            text(_aside(x), TOP + 12, "out of memory", label),
        ]

    def legend(self) -> list[str]:
        """Below the plot: what each colour is, with its bytes at the peak."""
        at_peak = self.columns[self.peak].roles
        box = '<rect x="{x}" y="{y}" width="11" height="11" fill="{colour}"/>'
        dash = '<path d="M{x} {middle}h11" stroke="{colour}" stroke-width="2"/>'
        entries = [
            (box, colour, f"{role} {readable(at_peak.get(role, 0))}")
            for role, colour in reversed(self.colours())  # as stacked, from the top
        ]
        if any(self.reserved):
            entries.append((dash, INK, f"reserved, at most {readable(max(self.reserved))}"))
        if self.limit is not None and not self.limit_is_drawn:
            entries.append((dash, ALARM, f"limit {readable(self.limit)}, off the scale"))
        left = LEFT + 70.0
        x, y = left, BOTTOM + 30
        caption = "events in order"
        if self.marks:
            caption += ", the width of a phase as the square root of their number"
        parts = [
            text(LEFT, BOTTOM + 16, caption, f'fill="{FAINT}"'),
            text(LEFT, BOTTOM + 40, "at the peak", f'fill="{FAINT}"'),
        ]
        for shape, colour, label in entries:
            width = 16 + CHAR * len(label) + 18
            if x + width > WIDTH:
                x, y = left, y + ROW + 4
            parts.append(shape.format(x=round(x, 1), y=y, middle=y + 5.5, colour=colour))
            parts.append(text(x + 16, y + 10, label))
            x += width
        self.legend_bottom = y + ROW + 12
        return parts

    def tooltips(self) -> list[str]:
        """An invisible bar over every column that tells what it holds."""
        bars = []
        for i, sample in enumerate(self.columns):
            left, right = self.x(i), self.x(i + 1)
            lines = [f"event {sample.event}, {self._phase_at(sample.event)}"]
            lines += [
                f"{r}: {readable(size)}" for r in self.roles if (size := sample.roles.get(r, 0))
            ]
            lines.append(f"together: {readable(sample.total)}")
            if sample.reserved:
                lines.append(f"reserved: {readable(sample.reserved)}")
            bars.append(
                f'<rect class="hover" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
                f'height="{HEIGHT}" fill-opacity="0"><title>{escape(chr(10).join(lines))}</title>'
                "</rect>"
            )
        return bars

    def _phase_at(self, index: int) -> str:
        place = bisect_right([begin for begin, _ in self.marks], index)
        return self.marks[place - 1][1] if place else "before the first phase"

    def phase_peaks(self) -> list[tuple[str, int, int]]:
        """(phase, peak allocated, peak reserved) of every phase drawn."""
        peaks = []
        bounds = [self.column_of(index) for index, _ in self.marks] + [len(self.columns)]
        for (begin, end), (_, name) in zip(pairwise(bounds), self.marks, strict=True):
            if name != BETWEEN:
                held, reserved = self.totals[begin:end], self.reserved[begin:end]
                peaks.append((name, max(held), max(reserved)))
        return peaks


def _aside(x: float) -> float:
    """Where a label at x begins, or ends in the right half of the picture."""
    return x + 8 if x < (LEFT + RIGHT) / 2 else x - 8


def _beside(x: float) -> str:
    return 'text-anchor="start"' if _aside(x) > x else 'text-anchor="end"'


def text(x: float, y: float, content: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(content)}</text>'


def _haloed(x: float, y: float, content: str, attributes: str = "") -> list[str]:
    """Text that stays legible on lines and areas."""
    halo = f'{attributes} stroke="#ffffff" stroke-width="3" aria-hidden="true"'
    return [text(x, y, content, halo), text(x, y, content, attributes)]


def readable(size: int) -> str:
    if not size:
        return "0"
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _step(top: float) -> float:
    """A round distance between grid lines, for 4 to 8 of them."""
    step = float(MIB)
    while top / step > 8:
        step *= 2
    return step
