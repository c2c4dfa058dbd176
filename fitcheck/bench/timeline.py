"""A picture of a trace: memory over its events, stacked by role, under the card's limit.

    drawn = samples(events, roles, Allocator(limit_bytes), marks)
    svg = timeline_svg(drawn, limit_bytes=limit_bytes, marks=marks, title="PPO, Llama-3.2-1B")

The picture has a few hundred columns and a trace up to a million events: a column shows the moment
of its events at which most memory was held, so no peak is lost. It needs nothing from outside.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate, pairwise
from math import sqrt
from typing import NamedTuple

from fitcheck.bench.allocator import Allocator, OutOfMemory

COLUMNS = 480
MIN_COLUMNS = 12  # of a phase, however few its events
WIDTH, LEFT, RIGHT, TOP, HEIGHT = 1000, 64, 896, 86, 300  # px; the plot from LEFT to RIGHT
BOTTOM = TOP + HEIGHT
LABEL_ROWS = 3
CHAR = 6.3  # px, the width of an average character at font size 11
MIB, GIB = 1024**2, 1024**3

# Okabe and Ito's palette for colour-blind readers, lightened; then greys.
COLOURS = "#5fa8d3 #f0b44c #57b894 #e0875a #d896bd #f2e37e #4d7fb0 #a8a29e #78716c #d6d3d1".split()
INK, GRID, ALARM = "#1c1917", "#e7e5e4", "#c2261b"


class Sample(NamedTuple):
    """What is held after the event `index`: bytes by role, and bytes reserved (0: not known)."""

    index: int
    roles: Mapping[str, int]
    reserved: int = 0


def samples(
    events: Sequence[tuple[int, int]],
    roles: Mapping[int, str],
    allocator: Allocator,
    marks: Sequence[tuple[int, str]] = (),
) -> list[Sample]:
    """Replay `events` through `allocator`: the fullest moment of each column of the picture.

    `roles` names the role of each allocation id, "other" where it does not; bytes are those of
    blocks, as `torch.cuda.memory_allocated` counts them. Ends where memory runs out.
    """
    starts = _column_starts(len(events), marks)
    held: dict[str, int] = {}
    live: dict[int, tuple[int, int]] = {}  # id -> (block, its bytes)
    drawn: list[Sample] = []
    column, most, reserved = -1, -1, 0
    try:
        for index, (size, name) in enumerate(events):
            if column + 1 < len(starts) and index >= starts[column + 1]:
                column = bisect_right(starts, index) - 1
                most, reserved = -1, 0
            if size > 0:
                before = allocator.allocated
                block = allocator.malloc(size)
                live[name] = block, allocator.allocated - before
                role = roles.get(name, "other")
                held[role] = held.get(role, 0) + live[name][1]
            elif size == 0:
                block, taken = live.pop(name)
                allocator.free(block)
                held[roles.get(name, "other")] -= taken
            else:
                allocator.empty_cache()
            reserved = max(reserved, allocator.reserved)
            if allocator.allocated > most:
                if most >= 0:
                    drawn.pop()
                most = allocator.allocated
                drawn.append(Sample(index, dict(held), reserved))
            elif reserved > drawn[-1].reserved:
                drawn[-1] = drawn[-1]._replace(reserved=reserved)
    except OutOfMemory:
        pass  # what is drawn ends here
    return drawn


def _column_starts(length: int, marks: Sequence[tuple[int, str]]) -> list[int]:
    """The first event of each column. A phase's width grows with the square root of its events."""
    bounds = sorted({0, length, *(index for index, _ in marks if 0 < index < length)})
    weight = [sqrt(end - begin) for begin, end in pairwise(bounds)]
    starts: list[int] = []
    for (begin, end), share in zip(pairwise(bounds), weight, strict=True):
        count = max(MIN_COLUMNS, round(COLUMNS * share / sum(weight)))
        starts += [begin + (end - begin) * i // count for i in range(count)]
    return starts


def timeline_svg(
    samples: Sequence[Sample] | Sequence[tuple[int, Mapping[str, int]]],
    *,
    limit_bytes: int | None = None,
    marks: Sequence[tuple[int, str]] = (),
    title: str = "",
    length: int | None = None,
    oom: int | None = None,
    tooltips: bool = False,
) -> str:
    """The timeline as one SVG element, self-contained.

    `samples` are in the order of their index, any number of them; `marks` are (event index, phase
    name); `length` is the number of events where the last sample does not tell; `oom` is the
    event at which memory ran out.
    """
    chart = _Chart([Sample(*sample) for sample in samples], marks, length, limit_bytes)
    parts = [
        f'<text x="{LEFT}" y="24" font-size="16" font-weight="600">{escape(title)}</text>',
        chart.grid(),
        chart.areas(),
        chart.reserved_line(),
        chart.phases(),
        chart.limit_line(),
        chart.peak_label(),
        chart.end_label(oom),
    ]
    legend, height = chart.legend()
    parts.append(legend)
    if tooltips:
        parts.append(chart.tooltips())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11" fill="{INK}">'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>' + "".join(parts) + "</svg>"
    )


def timeline_html(
    samples: Sequence[Sample] | Sequence[tuple[int, Mapping[str, int]]],
    *,
    limit_bytes: int | None = None,
    marks: Sequence[tuple[int, str]] = (),
    title: str = "",
    length: int | None = None,
    oom: int | None = None,
) -> str:
    """The timeline as a page of its own, with the peak of each phase; point at it for details."""
    svg = timeline_svg(
        samples,
        limit_bytes=limit_bytes,
        marks=marks,
        title=title,
        length=length,
        oom=oom,
        tooltips=True,
    )
    chart = _Chart([Sample(*sample) for sample in samples], marks, length, limit_bytes)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_bytes(allocated)}</td><td>{_bytes(reserved)}</td></tr>"
        for name, allocated, reserved in chart.phase_peaks()
    )
    style = (
        f"body{{font:15px system-ui,sans-serif;color:{INK};background:#fff;margin:24px auto;"
        f"max-width:{WIDTH}px}}svg{{max-width:100%;height:auto}}table{{border-collapse:collapse}}"
        f"td,th{{padding:3px 18px 3px 0;text-align:right;border-bottom:1px solid {GRID}}}"
        "td:first-child,th:first-child{text-align:left}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title or 'Memory timeline')}</title><style>{style}</style></head><body>"
        f"{svg}<table><tr><th>phase</th><th>peak allocated</th><th>peak reserved</th></tr>"
        f"{rows}</table></body></html>\n"
    )


class _Chart:
    """The samples by column, and the pieces of the picture drawn from them."""

    def __init__(
        self,
        samples: list[Sample],
        marks: Sequence[tuple[int, str]],
        length: int | None,
        limit: int | None,
    ) -> None:
        self.length = length or (samples[-1].index + 1 if samples else 1)
        self.marks = [mark for mark in marks if mark[0] < self.length]
        self.limit = limit
        self.starts = _column_starts(self.length, self.marks)
        self.columns = self._fullest(samples)
        self.totals = [sum(sample.roles.values()) for sample in self.columns]
        self.reserved = [sample.reserved for sample in self.columns]
        self.peak = max(range(len(self.columns)), key=self.totals.__getitem__, default=0)
        self.roles = self._stacking_order()
        highest = max([*self.totals, *self.reserved, 1])
        # A limit far above would flatten the picture: it is then said, not drawn.
        self.draws_limit = limit is not None and limit <= 3 * highest
        self.top = 1.08 * max(highest, limit if limit and self.draws_limit else 0)

    def _fullest(self, samples: list[Sample]) -> list[Sample]:
        """The fullest sample of every column; of the last one before it where it has none."""
        columns: list[Sample] = []
        place = 0
        last = Sample(0, {})
        for i, start in enumerate(self.starts):
            end = self.starts[i + 1] if i + 1 < len(self.starts) else self.length
            inside = []
            while place < len(samples) and samples[place].index < end:
                inside.append(samples[place])
                place += 1
            if inside:
                fullest = max(inside, key=lambda sample: sum(sample.roles.values()))
                most = max(sample.reserved for sample in inside)
                columns.append(fullest._replace(reserved=most))
                last = inside[-1]
            else:
                columns.append(last._replace(index=start))
        return columns
