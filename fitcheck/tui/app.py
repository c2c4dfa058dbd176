"""The app: it holds the view, the way back, and what works on every screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message

from fitcheck import machine
from fitcheck.answer import DEFAULT_MODEL, PRETENDED, resolve
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.tui import view as views
from fitcheck.tui.fit import Fit
from fitcheck.tui.knobs import notch, shown
from fitcheck.tui.page import Page
from fitcheck.tui.view import View, judged

if TYPE_CHECKING:
    from textual.screen import Screen


class Detected(Message):
    """What this computer has."""

    def __init__(self, found: machine.Machine) -> None:
        super().__init__()
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

    def get_default_screen(self) -> Screen[object]:
        return Fit()

    def on_mount(self) -> None:
        if self.found is None:
            self.call_after_refresh(self.detect)

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
        """Every screen draws the view anew."""
        for screen in self.screen_stack:
            if isinstance(screen, Page):
                screen.redraw()

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
