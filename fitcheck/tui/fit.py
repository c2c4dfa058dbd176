"""The home screen: one question, one answer, always on screen."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.geometry import Size

from fitcheck.tui import draw
from fitcheck.tui.knobs import fields_of, notch, shown
from fitcheck.tui.lines import Line, Lines
from fitcheck.tui.page import Page
from fitcheck.tui.step import phase_bars, skyline
from fitcheck.tui.view import answered, estimated, prices

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
        Binding("u", "app.undo", "undo"),
        Binding("r", "app.reset", "reset", show=False),
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
            yield Lines(self.knobs, id="knobs")
            yield Lines(self.answer, id="answer")
        yield Lines(lambda size: self.hint(size.width), id="hint", classes="one")
        yield self.keys()

    def knobs(self, size: Size) -> list[Line]:
        """The rows, scrolled so that the chosen one is in sight."""
        if self.field not in fields_of(self.fitcheck.view.plan):
            self.field = "model"
        priced = prices if size.width >= PRICED else None
        lines, chosen = draw.knobs(self.fitcheck.view, self.field, size.width, priced)
        self.call_after_refresh(self.query_one("#knobs", Lines).reveal, chosen)
        return lines

    def answer(self, size: Size) -> list[Line]:
        """Memory through the step, and what is alive at the peak."""
        report, rows = self.fitcheck.view.report, size.height
        if rows < 10:
            return draw.peak(report, size.width, rows)
        if rows >= TALL:
            lines = skyline(report, size.width, min(20, rows - 22))
        else:
            lines = phase_bars(report, size.width, rows - 12)
        left = rows - len(lines)
        return [*lines, *draw.peak(report, size.width, left)] if left > 2 else lines

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
