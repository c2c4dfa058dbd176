"""The app: it holds the view, the way back, and what works on every screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.timer import Timer

from fitcheck import machine
from fitcheck.answer import DEFAULT_MODEL, PRETENDED, resolve
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.tui import view as views
from fitcheck.tui.candidates import Candidate
from fitcheck.tui.fit import Fit
from fitcheck.tui.knobs import notch, shown
from fitcheck.tui.lines import Lines
from fitcheck.tui.page import Page
from fitcheck.tui.picker import Pick
from fitcheck.tui.tips import Tip, tips
from fitcheck.tui.view import View, judged

if TYPE_CHECKING:
    from textual.screen import Screen

PAUSE = 0.05  # seconds from the last key to the search for advice


class Detected(Message):
    """What this computer has."""

    def __init__(self, found: machine.Machine) -> None:
        super().__init__()
        self.found = found


class Advised(Message):
    """What would help a plan."""

    def __init__(self, plan: Plan, found: list[Tip]) -> None:
        super().__init__()
        self.plan = plan
        self.found = found


class FitCheckApp(App[None]):
    """plan: what to ask first; found: this computer, looked up after the first paint if None."""

    CSS_PATH = "fitcheck.tcss"
    TITLE = "FitCheck"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "show_help", "help", key_display="?"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, plan: Plan | None = None, found: machine.Machine | None = None) -> None:
        super().__init__()
        self.first = plan or resolve(DEFAULT_MODEL, gpu=PRETENDED)
        self.found = found
        self.view = judged(self.first, views.PRETENDED if plan or found else views.DETECTING)
        self.past: list[View] = []

        self.advised: tuple[Plan | None, list[Tip]] = (None, [])
        self.later: Timer | None = None

    def get_default_screen(self) -> Screen[object]:
        return Fit()

    def on_mount(self) -> None:
        if self.found is None and self.view.card == views.DETECTING:
            self.call_after_refresh(self.detect)
        self.seek()

    @work(thread=True)
    def detect(self) -> None:
        """Ask the drivers, off the screen's own thread."""
        self.post_message(Detected(machine.detect()))

    def on_detected(self, message: Detected) -> None:
        """Judge this machine's card, unless another was chosen meanwhile."""
        self.found = message.found
        if self.view.card == views.DETECTING:
            self.view = self.at_home(self.view.plan)
            self.redraw()

    def at_home(self, plan: Plan) -> View:
        """The plan on this machine's freest card; pretended as it is where there is none."""
        card = machine.best(self.found) if self.found else None
        if card is None:
            self.notify(
                f"No GPU was found here: an empty {shown('gpu', plan.gpu)} is pretended. "
                "g chooses another.",
                title="Pretending",
            )
            return judged(plan)
        ram = self.found.ram.usable_bytes if self.found and self.found.ram else None
        try:
            return judged(plan.change(gpu=card.card, memory=card.usable, ram=ram), views.DETECTED)
        except FitCheckError as fault:
            self.refuse(fault)
            return judged(plan)

    def attempt(self, change: Callable[[], Plan], card: str | None = None) -> bool:
        """Show the changed plan; a change that makes no sense is refused with its reason."""
        try:
            view = judged(change(), card or self.view.card)
        except FitCheckError as fault:
            self.refuse(fault)
            return False
        if view != self.view:
            self.past.append(self.view)
            self.view = view
            self.redraw()
        return True

    def refuse(self, fault: FitCheckError) -> None:
        """Say why not, and what would work."""
        self.notify(fault.hint or "", title=fault.message, severity="warning", markup=False)

    def redraw(self) -> None:
        """Every screen draws the view anew; advice comes when the answer has been painted."""
        for screen in self.screen_stack:
            if isinstance(screen, Page):
                screen.redraw()
        self.seek()

    @property
    def advice(self) -> tuple[list[Tip], bool]:
        """The tips, and whether they are those of an earlier plan."""
        plan, found = self.advised
        return found, plan != self.view.plan

    def seek(self) -> None:
        """Look for advice a moment after the last key."""
        if self.later is not None:
            self.later.stop()
        if self.advice[1]:
            self.later = self.set_timer(PAUSE, self.search)

    @work(thread=True, exclusive=True, group="advice")
    def search(self) -> None:
        plan = self.view.plan
        self.post_message(Advised(plan, tips(plan)))

    def on_advised(self, message: Advised) -> None:
        self.advised = (message.plan, message.found)
        for lines in self.screen_stack[0].query("#answer").results(Lines):
            lines.redraw()

    def action_apply(self, key: int) -> None:
        """Apply one of the five tips."""
        found, stale = self.advice
        if stale:
            self.notify("still searching what would help")
        elif key <= len(found):
            self.attempt(lambda: found[key - 1].plan)

    def choose(self, field: str) -> None:
        """Pick a value of a field from all there are."""

        def picked(candidate: Candidate | None) -> None:
            if candidate is not None:
                self.take(field, candidate)

        self.push_screen(Pick(self.view.plan, field), picked)

    def take(self, field: str, candidate: Candidate) -> None:
        """Put what was picked into the plan."""
        card = views.PRETENDED if field == "gpu" else None
        self.attempt(lambda: candidate.change(self.view.plan), card)

    def turn(self, name: str, step: int) -> None:
        """Change a field by one notch, or say that there is none."""
        plan = notch(self.view.plan, name, step)
        if plan is None:
            value = shown(name, getattr(self.view.plan, name))
            self.notify(f"{name}: nothing {'beyond' if step > 0 else 'below'} {value}")
            return
        card = views.PRETENDED if name == "gpu" else None
        self.attempt(lambda: plan, card)

    def action_undo(self) -> None:
        """Back to the plan before the last change."""
        if not self.past:
            self.notify("nothing to undo")
            return
        self.view = self.past.pop()
        self.redraw()

    def action_reset(self) -> None:
        """Back to the defaults of the method, on the same model and card."""
        plan = self.view.plan
        self.attempt(
            lambda: Plan(
                model=plan.model,
                gpu=plan.gpu,
                memory=plan.memory,
                ram=plan.ram,
                method=plan.method,
            )
        )
