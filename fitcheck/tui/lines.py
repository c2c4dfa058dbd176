"""Rows of styled text: what every view draws, and the one widget that shows them.

A drawing is a pure function that returns lines; nothing in it knows about widgets or colours.

    line = [Span("✓ FITS", "good bold"), Span("  7.1 GiB to spare")]
    plain([line])       # "✓ FITS  7.1 GiB to spare"
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, overload

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip


class Span(NamedTuple):
    """A text in one style: names of fitcheck.tcss such as "bad bold"; click: an action."""

    text: str
    style: str = ""
    click: str = ""


Line = list[Span]


def text(line: Iterable[Span]) -> str:
    """A line without its styles."""
    return "".join(span.text for span in line)


def plain(lines: Iterable[Line]) -> str:
    """Lines without their styles."""
    return "\n".join(text(line).rstrip() for line in lines)


def width(line: Iterable[Span]) -> int:
    """Columns that a line takes on a terminal."""
    return sum(cell_len(span.text) for span in line)


def cut(words: str, room: int) -> str:
    """The text in so many columns, with an ellipsis where it was longer."""
    if cell_len(words) <= room:
        return words
    return set_cell_size(words, room - 1).rstrip() + "…" if room > 0 else ""


def cut_inside(name: str, room: int) -> str:
    """The start and the end of a name too long: names end in what tells them apart."""
    if cell_len(name) <= room:
        return name
    tail = max(0, (room - 1) // 2)
    return (
        f"{name[: max(0, room - 1 - tail)]}…{name[len(name) - tail :]}" if room > 1 else "…"[:room]
    )


def padded(words: str, room: int) -> str:
    """The text in exactly so many columns."""
    return set_cell_size(cut(words, room), max(0, room))


def apart(left: Line, right: Line, room: int) -> Line:
    """The left part, and the right part at the end of the line where there is room for it."""
    gap = room - width(left) - width(right)
    return [*left, Span(" " * gap), *right] if gap > 0 else left


def wrapped(words: str, room: int, style: str = "", indent: str = "") -> list[Line]:
    """A paragraph; the lines after the first begin with the indent."""
    found = textwrap.wrap(words, max(8, room), subsequent_indent=indent)
    return [[Span(part, style)] for part in found]


class Lazily(Sequence[Line]):
    """Lines that are made when they come into view: a catalog has hundreds."""

    def __init__(self, length: int, make: Callable[[int], Line]) -> None:
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Line: ...
    @overload
    def __getitem__(self, index: slice) -> list[Line]: ...
    def __getitem__(self, index: int | slice) -> Line | list[Line]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self.length))]
        return self.make(index)


class Lines(ScrollView, can_focus=False):
    """Shows what a drawing returns for its size; a line at a time, so that a long list is cheap."""

    STYLES = (
        *("good", "warn", "bad", "bold", "dim", "key", "head", "title", "cursor", "mark", "chip"),
        *(f"c{i}" for i in range(8)),
        *(f"k{i}" for i in range(8)),
    )
    COMPONENT_CLASSES = set(STYLES)

    def __init__(
        self,
        drawing: Callable[[Size], Sequence[Line]] | None = None,
        *,
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.drawing = drawing
        self.lines: Sequence[Line] = ()
        self.barred = False
        self.styles_known: dict[tuple[str, str], Style] = {}

    def drawn(self, size: Size) -> Sequence[Line]:
        """The lines for a width and a height; a subclass may draw from its own state."""
        return self.drawing(size) if self.drawing else ()

    def redraw(self) -> None:
        """Draw anew, after a change of what is shown or of the size."""
        if not self.is_attached or not self.size:
            return
        room, height = self.container_size.width, max(1, self.container_size.height)
        bar = self.styles.scrollbar_size_vertical

        def lines_beside(bar: int) -> Sequence[Line]:
            return self.drawn(Size(max(1, room - bar), height))

        # Whether there is a bar decides the width, and the lines decide whether there is one: the
        # last answer is tried first.
        lines = lines_beside(bar * self.barred)
        if (len(lines) > height) != self.barred:
            self.barred = not self.barred
            lines = lines_beside(bar * self.barred)
        self.lines = lines
        extent = Size(self.size.width, len(lines))
        if extent != self.virtual_size:
            self.virtual_size = extent
        self.refresh()

    def on_mount(self) -> None:
        self.redraw()

    def on_resize(self) -> None:
        self.redraw()

    def reveal(self, first: int, last: int | None = None) -> None:
        """Scroll as little as needed to see these lines."""
        last = first if last is None else last
        top, height = self.scroll_offset.y, self.size.height
        if first < top:
            self.scroll_to(y=first, animate=False)
        elif last >= top + height:
            self.scroll_to(y=last - height + 1, animate=False)

    def notify_style_update(self) -> None:
        """Another theme: forget the colours of this one."""
        super().notify_style_update()
        self.styles_known.clear()

    def render_line(self, y: int) -> Strip:
        index, room = y + self.scroll_offset.y, self.size.width
        ground = self.style_of("", "")
        if not 0 <= index < len(self.lines):
            return Strip.blank(room, ground)
        segments = [
            Segment(span.text, self.style_of(span.style, span.click)) for span in self.lines[index]
        ]
        return Strip(segments).adjust_cell_length(room, ground)

    def style_of(self, names: str, click: str) -> Style:
        """What the theme makes of a span's style, on this widget's ground, and of a click on it."""
        known = self.styles_known.get((names, click))
        if known is None:
            known = self.rich_style
            for name in names.split():
                known += self.get_component_rich_style(name, partial=True)
            if click:
                known += Style(meta={"@click": click})
            self.styles_known[names, click] = known
        return known
