"""A list to search: every value that a field can take, each with what becomes of the plan.

The rows in view are judged first, the others when nothing else is to be done; on a wide terminal
the list of models is always there, and so answers "what can I train on this card?" as knobs turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.geometry import Size
from textual.message import Message
from textual.widgets import Input

from fitcheck.plan import Plan
from fitcheck.text import WORDS
from fitcheck.tui.candidates import (
    Candidate,
    Judgement,
    Query,
    amount,
    candidates,
    judgement,
    matching,
    told,
    typed,
)
from fitcheck.tui.draw import TONES
from fitcheck.tui.knobs import doc, shown
from fitcheck.tui.lines import Lazily, Line, Lines, Span, cut, cut_inside, padded, width
from fitcheck.tui.page import Page

SLICE = 0.008  # seconds of judging between two looks at the keyboard
PAUSE = 0.03  # seconds that the answer itself has to be painted first
DETAILED = 64  # columns from which a row has room for family and licence


class Rows(Lines):
    """The rows; a click on one picks it."""

    class Picked(Message):
        """A row was clicked."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def action_pick(self, index: int) -> None:
        self.post_message(self.Picked(index))


class Picker(Container):
    """A search, what it found, and the verdict on each row. plan: under which rows are judged."""

    class Chosen(Message):
        """A row was chosen."""

        def __init__(self, field: str, candidate: Candidate) -> None:
            super().__init__()
            self.field = field
            self.candidate = candidate

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "row", show=False),
        Binding("down", "move(1)", "row", show=False),
        Binding("pageup", "move(-10)", "page", show=False),
        Binding("pagedown", "move(10)", "page", show=False),
    ]

    def __init__(self, plan: Plan, field: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.plan = plan
        self.field = field
        self.all: list[Candidate] = []
        self.judged: dict[str, Judgement] = {}
        self.stale: set[str] = set()
        self.query_text = ""
        self.found: list[Candidate] = []
        self.at = 0

    def compose(self) -> ComposeResult:
        yield Input(placeholder="/ search", compact=True)
        yield Lines(self.summary, id="summary", classes="one")
        yield Rows(self.rows, id="rows")

    def on_resize(self) -> None:
        """Read the catalog when there is something to see of it, after the first paint."""
        if not self.all:
            self.call_after_refresh(self.load)

    def load(self) -> None:
        if not self.query(Rows):
            return
        self.all = self.found = candidates(self.plan, self.field)
        noun = {"model": "models", "gpu": "GPUs"}.get(self.field, "values")
        self.query_one(Input).placeholder = f"/ search {len(self.all)} {noun}"
        self.at = max(0, self._here())
        self.judge()
        self.redraw()
        self.call_after_refresh(self.reveal)

    def show(self, plan: Plan) -> None:
        """Judge the rows anew under another plan; until then the old answers stay, dimmed."""
        if plan == self.plan or not self.all:
            self.plan = plan
            return
        self.plan = plan
        self.stale = set(self.judged)
        if not self.query_one(Input).has_focus:
            self.at = max(0, self._here())
        self.judge()
        self.redraw()
        self.reveal()

    def redraw(self) -> None:
        for lines in self.query(Lines):
            lines.redraw()

    def reveal(self) -> None:
        for rows in self.query(Rows):  # none once the screen was left
            rows.reveal(self.at)

    def _here(self) -> int:
        """The row of what the plan has now."""
        now = getattr(self.plan, self.field)
        names = {getattr(now, "id", None), shown(self.field, now)}
        rows = (i for i, candidate in enumerate(self.found) if candidate.id in names)
        return next(rows, -1)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search as you type."""
        event.stop()
        self.query_text = event.value
        self.refilter()
        self.at = 0 if event.value else max(0, self._here())
        self.judge()
        self.redraw()
        self.call_after_refresh(self.reveal)

    def refilter(self) -> None:
        query = Query.parse(self.query_text, self.field)
        self.found = matching(self.all, query)
        extra = typed(self.plan, self.field, self.query_text)
        if extra and all(candidate.id != extra.id for candidate in self.found):
            self.found = [*self.found, extra]
        if query.fits:
            fitting = ("fits", "tight")
            self.found = [c for c in self.found if self._verdict(c) in fitting]

    def _verdict(self, candidate: Candidate) -> str | None:
        known = self.judged.get(candidate.id)
        return known.verdict if known and candidate.id not in self.stale else None

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.choose(self.at)

    def on_rows_picked(self, message: Rows.Picked) -> None:
        message.stop()
        self.choose(message.index)

    def choose(self, index: int) -> None:
        if 0 <= index < len(self.found):
            self.post_message(self.Chosen(self.field, self.found[index]))

    def action_move(self, rows: int) -> None:
        self.at = max(0, min(len(self.found) - 1, self.at + rows))
        self.redraw()
        self.reveal()

    @work(exclusive=True, group="judge")
    async def judge(self) -> None:
        """Judge what is not judged yet: in view first, a slice at a time."""
        await asyncio.sleep(PAUSE)
        if not self.query(Rows):
            return
        lines = self.query_one(Rows)
        top, height = lines.scroll_offset.y, max(1, lines.size.height)
        in_view = self.found[top : top + height]
        only_fitting = Query.parse(self.query_text, self.field).fits
        seen = time.monotonic()
        for many in (in_view, self.all if len(in_view) < len(self.all) else self.found):
            begun = time.monotonic()
            for candidate in many:
                if candidate.id in self.judged and candidate.id not in self.stale:
                    continue
                self.judged[candidate.id] = judgement(self.plan, candidate)
                self.stale.discard(candidate.id)
                if time.monotonic() - begun > SLICE:
                    await asyncio.sleep(SLICE)
                    begun = time.monotonic()
                if only_fitting and begun - seen > 0.2:
                    seen = begun
                    self.refilter()
                    self.redraw()
            if only_fitting:
                self.refilter()
            self.redraw()

    def summary(self, size: Size) -> list[Line]:
        """How many there are and fit, and the search as it was understood."""
        judged = [self._verdict(candidate) for candidate in self.all]
        whole = not self.stale and len(self.judged) >= len(self.all)
        fit = sum(verdict in ("fits", "tight") for verdict in judged)
        words = f"{len(self.found)} of {len(self.all)}" if self.query_text else f"{len(self.all)}"
        words += f" · {fit} fit" if whole else " · judging…"
        chips = Query.parse(self.query_text, self.field).chips(self.field)
        line = [Span(words, "dim"), *(Span(f" {chip} ", "chip") for chip in chips)]
        return [line if width(line) <= size.width else [Span(cut(words, size.width), "dim")]]

    def rows(self, size: Size) -> Sequence[Line]:
        """A row for each candidate: verdict, name, size, and the peak under the plan."""
        if not self.found:
            return self.nothing(size.width)
        detailed = size.width >= DETAILED
        names = min(44, size.width - 30) if detailed else size.width - 11
        here = self._here()

        def make(index: int) -> Line:
            return self.row(index, size.width, names, detailed, index == here)

        return Lazily(len(self.found), make)

    def row(self, index: int, room: int, names: int, detailed: bool, current: bool) -> Line:
        candidate = self.found[index]
        known = self.judged.get(candidate.id)
        focus = "cursor" if index == self.at else ""
        old = "dim" if candidate.id in self.stale else ""
        glyph, tone, number = " ", "dim", "…"
        if known:
            glyph = WORDS[known.verdict][0] if known.verdict else "–"
            tone = TONES[known.verdict] if known.verdict else "dim"
            number = told(known, self.field)
        click = f"pick({index})"
        line = [
            Span(f"{glyph} ", f"{tone if not focus else 'bold'} {focus}", click),
            Span(padded(cut_inside(candidate.label, names), names), focus, click),
            Span(f"{number:>7}", f"{focus} {old}", click),
            Span(" ◀" if current else "  ", focus, click),
        ]
        if detailed:
            detail = known.why if known and known.why else candidate.detail
            size = f"  {amount(candidate.size, self.field):>7}  "
            line.insert(2, Span(size, f"{focus}", click))
            left = room - width(line) - 1
            line.append(Span(padded(" " + cut(detail, left), left + 1), f"dim {focus}", click))
        return line

    def nothing(self, room: int) -> list[Line]:
        """No match: what a search can be."""
        if Query.parse(self.query_text, self.field).fits and len(self.judged) < len(self.all):
            return [[Span("judging…", "dim")]]
        lessons = [
            "Nothing matches.",
            "Every word must appear: in the name, family, licence or maker.",
            "Sizes: 7b in a name, 1b..13b of parameters, 16..24 GB of a card.",
            "fits: only what fits under the plan as it is.",
            "esc leaves the search.",
        ]
        return [[Span(cut(lesson, room), "dim")] for lesson in lessons]


class Pick(Page):
    """The picker on a screen of its own."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "enter", "choose", key_display="enter"),
    ]

    def __init__(self, plan: Plan, field: str) -> None:
        super().__init__()
        self.plan = plan
        self.field = field

    def compose(self) -> ComposeResult:
        yield Lines(lambda size: self.heading(size.width), classes="one title")
        yield Picker(self.plan, self.field, id="picker")
        yield self.keys()

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    def heading(self, room: int) -> list[Line]:
        words = f" {self.field}  "
        what = padded(doc(self.field), room - len(words))
        return [[Span(words, "title bold"), Span(what, "title")]]

    def on_picker_chosen(self, message: Picker.Chosen) -> None:
        if self.is_current:  # a second enter came before the first was heeded
            self.dismiss(message.candidate)

    def action_enter(self) -> None:
        picker = self.query_one(Picker)
        picker.choose(picker.at)

    def action_scroll(self, lines: int) -> None:
        """Without the search in focus the same keys choose a row."""
        self.query_one(Picker).action_move(lines)
