"""Compare: pinned plans side by side, the rows that differ alone."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.geometry import Size

from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.text import WORDS, gib
from fitcheck.tui.draw import TONES
from fitcheck.tui.knobs import fields_of, shown
from fitcheck.tui.lines import Line, Span, cut, cut_inside, padded
from fitcheck.tui.page import Page
from fitcheck.tui.view import answered

LABELS, COLUMN = 19, 17


def differing(plans: list[Plan]) -> list[str]:
    """The fields in which the plans are not all alike, in the order of the home screen."""
    names = list(dict.fromkeys(name for plan in plans for name in fields_of(plan)))
    return [name for name in names if len({shown(name, getattr(p, name)) for p in plans}) > 1]


def outcome(report: Report | None) -> list[tuple[str, str, str]]:
    """(what, value, tone) of each row below the knobs."""
    if report is None:
        return [("verdict", "not covered", "dim")]
    glyph, words = WORDS[report.verdict]
    spare = report.spare_bytes
    return [
        ("verdict", f"{glyph} {words.lower()}", TONES[report.verdict]),
        ("peak GiB", gib(report.peak_bytes), "bold"),
        ("usable GiB", gib(report.usable_bytes), ""),
        ("spare GiB", f"{'−' if spare < 0 else ''}{gib(abs(spare))}", ""),
        ("peak phase", report.peak_phase.name, ""),
        ("RAM GiB", gib(report.ram.peak_bytes), ""),
        ("step seconds", f"{report.speed.step_seconds:.3g}" if report.speed else "-", ""),
    ]


class Compare(Page):
    """The plan as it is, and the pinned ones, each a column."""

    NAME = "compare"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "column", key_display="←→"),
        Binding("right,l", "move(1)", "column", show=False),
        Binding("c", "pin", "pin this plan"),
        Binding("x", "unpin", "unpin"),
        Binding("enter", "open", "open"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.at = 0

    def heading(self, room: int) -> list[Line]:
        return self.named("COMPARE", f"{len(self.fitcheck.pins)} pinned", room)

    def plans(self) -> list[Plan]:
        """The plan as it is first, then the pinned ones."""
        return [self.fitcheck.view.plan, *self.fitcheck.pins]

    def body(self, size: Size) -> list[Line]:
        plans, room = self.plans(), size.width
        self.at = min(self.at, len(plans) - 1)
        if len(plans) == 1:
            lessons = [
                "Nothing is pinned yet.",
                "c pins the plan as it is; change it, come back, and see what differs.",
            ]
            return [[], *([Span(f" {cut(words, room - 2)}", "dim")] for words in lessons)]
        columns = max(1, (room - LABELS) // COLUMN)
        first = max(0, min(self.at - columns + 1, len(plans) - columns))
        seen = range(first, min(len(plans), first + columns))
        heads = ["now" if i == 0 else f"pin {i}" for i in seen]
        lines = [self._line("", [(head, "head") for head in heads], seen)]
        names = differing(plans)
        for name in names:
            cells = [(shown(name, getattr(plans[i], name)), "") for i in seen]
            lines.append(self._line(name, cells, seen))
        if not names:
            lines.append([Span(" All of them are the same plan.", "dim")])
        lines.append([])
        rows = [outcome(answered(plans[i])) for i in seen]
        longest = max(len(row) for row in rows)
        for at, (label, _, _) in enumerate(next(row for row in rows if len(row) == longest)):
            cells = [row[at][1:] if at < len(row) else ("", "") for row in rows]
            lines.append(self._line(label, cells, seen))
        if len(plans) > columns:
            lines += [[], [Span(f" {len(seen)} of {len(plans)} plans in sight: ←→", "dim")]]
        return lines

    def _line(self, label: str, cells: list[tuple[str, str]], seen: range) -> Line:
        line = [Span(f" {label:<{LABELS - 1}}", "dim")]
        for index, (words, style) in zip(seen, cells, strict=True):
            here = "cursor" if index == self.at else ""
            text = padded(" " + cut_inside(words, COLUMN - 2), COLUMN)
            line.append(Span(text, f"{style if not here else 'bold'} {here}"))
        return line

    def action_move(self, columns: int) -> None:
        self.at = max(0, min(len(self.plans()) - 1, self.at + columns))
        self.redraw()

    def action_pin(self) -> None:
        self.fitcheck.pin()

    def action_unpin(self) -> None:
        """Take a pinned plan out; it can be pinned again by opening it first."""
        if self.at:
            self.fitcheck.unpin(self.at - 1)
        else:
            self.notify("the plan as it is is not pinned")

    def action_open(self) -> None:
        """Make the chosen column the plan as it is; undo leads back."""
        if not self.is_current:  # a second enter
            return
        plan = self.plans()[self.at]
        self.dismiss()
        self.fitcheck.attempt(lambda: plan, self.fitcheck.card_of(plan))
