"""The home screen: one question, one answer, always on screen."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.geometry import Size
from textual.widgets import Input

from fitcheck.tui import draw
from fitcheck.tui.knobs import fields_of, notch, shown
from fitcheck.tui.lines import Line, Lines
from fitcheck.tui.page import Page
from fitcheck.tui.picker import Picker
from fitcheck.tui.step import phase_bars, skyline
from fitcheck.tui.tips import KEYS, tip_lines
from fitcheck.tui.view import answered, estimated

PRICED = 46  # columns from which the rows of knobs have room for prices
TALL = 30  # rows from which a skyline replaces the bars of the stages


class Fit(Page, inherit_bindings=False):
    """Verdict, bar, knobs with their prices, memory through the step, and what would help."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "turn('', -1)", "change", key_display="←→"),
        Binding("right,l", "turn('', 1)", "change", show=False),
        Binding("up,k", "move(-1)", "row", show=False),
        Binding("down,j", "move(1)", "row", show=False),
        Binding("home", "move(-999)", "first row", show=False),
        Binding("end", "move(999)", "last row", show=False),
        Binding("enter", "choose('')", "values", key_display="enter"),
        Binding("m,slash", "choose('model')", "model"),
        Binding("g", "choose('gpu')", "gpu"),
        Binding("1", "app.apply(1)", "apply", key_display="1-5"),
        *(Binding(str(key), f"app.apply({key})", "apply", show=False) for key in range(2, 6)),
        Binding("u", "app.undo", "undo"),
        Binding("r", "app.reset", "reset", show=False),
        Binding("escape", "leave", "leave the search", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.field = "tuning"

    def compose(self) -> ComposeResult:
        app = self.fitcheck
        yield Lines(lambda size: draw.title(app.view, size.width), classes="one title")
        yield Lines(lambda size: draw.verdict(app.view.report, size.width), classes="one")
        yield Lines(lambda size: draw.bar(app.view.report, size.width), classes="two")
        with Container(id="body"):
            yield Picker(app.view.plan, "model", id="dock")
            yield Lines(self.knobs, id="knobs")
            yield Lines(self.answer, id="answer")
        yield Lines(lambda size: self.hint(size.width), id="hint", classes="one")
        yield self.keys()

    def knobs(self, size: Size) -> list[Line]:
        """The rows, scrolled so that the chosen one is in sight."""
        if self.field not in fields_of(self.fitcheck.view.plan):
            self.field = "model"
        app = self.fitcheck
        known = app.priced if size.width >= PRICED else None
        stale = app.priced_plan != app.view.plan
        lines, chosen = draw.knobs(app.view, self.field, size.width, known, stale)
        self.call_after_refresh(self.query_one("#knobs", Lines).reveal, chosen)
        return lines

    def answer(self, size: Size) -> list[Line]:
        """Memory through the step, what would help, and what is alive at the peak."""
        app, room, rows = self.fitcheck, size.width, size.height
        report = app.view.report
        fits = report.verdict == "fits"
        found, stale = app.advice
        if rows < 10:
            return tip_lines(found, stale, fits, room, rows)
        if rows >= TALL:
            lines = [*skyline(report, room, min(20, rows - 18)), []]
        else:
            lines = phase_bars(report, room, rows - 7)
        lines += tip_lines(found, stale, fits, room, KEYS + 1)
        left = rows - len(lines)
        if left > 10:
            lines.append([])
        return [*lines, *draw.peak(report, room, left)] if left > 2 else lines

    def hint(self, room: int) -> list[Line]:
        """The chosen field's meaning, and its neighbours with their price."""
        plan, name = self.fitcheck.view.plan, self.field
        here = estimated(plan).peak_bytes
        steps = []
        for side in (-1, 1):
            beside = notch(plan, name, side)
            report = answered(beside)
            words = shown(name, getattr(beside, name)) if beside else ""
            if report and name != "gpu":
                words += f" {draw.signed(report.peak_bytes - here)}"
            steps.append(words if report else "")
        return draw.hint(name, (steps[0], steps[1]), room)

    def redraw(self) -> None:
        super().redraw()
        if self.has_class("-wide"):
            self.query_one(Picker).show(self.fitcheck.view.plan)

    def on_picker_chosen(self, message: Picker.Chosen) -> None:
        """A model of the list that is always there."""
        self.set_focus(None)
        self.fitcheck.take(message.field, message.candidate)

    def action_leave(self) -> None:
        """From the search back to the knobs."""
        self.set_focus(None)

    def action_choose(self, name: str) -> None:
        """All values of a field; of the model, where its list is on screen, the search there."""
        name = name or self.field
        if name == "model" and self.has_class("-wide"):
            self.query_one(Picker).query_one(Input).focus()
        else:
            self.fitcheck.action_choose(name)

    def action_go(self, name: str) -> None:
        """Choose a row."""
        self.field = name
        for id in ("#knobs", "#hint"):
            self.query_one(id, Lines).redraw()

    def action_move(self, rows: int) -> None:
        """Choose a row further up or down."""
        fields = fields_of(self.fitcheck.view.plan)
        at = fields.index(self.field) if self.field in fields else 0
        self.action_go(fields[max(0, min(len(fields) - 1, at + rows))])

    def action_turn(self, name: str, step: int) -> None:
        """Change a field by one notch."""
        self.field = name or self.field
        self.fitcheck.turn(self.field, step)
