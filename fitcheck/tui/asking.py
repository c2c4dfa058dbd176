"""Asking: the plan on screen and its answer, what is found beside it, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textual import work
from textual.app import App
from textual.message import Message
from textual.timer import Timer

from fitcheck import machine
from fitcheck.answer import DEFAULT_MODEL, PRETENDED, resolve
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.tui import view as views
from fitcheck.tui.draw import Price
from fitcheck.tui.knobs import notch, shown
from fitcheck.tui.lines import Lines
from fitcheck.tui.page import Page
from fitcheck.tui.state import State
from fitcheck.tui.tips import Tip, tips
from fitcheck.tui.view import View, judged, prices

PAUSE = 0.05  # seconds from the last key to the search for advice


def first_view(plan: Plan | None, card: str) -> View:
    """The view to begin with; where no plan is kept, or it is no longer covered, the default's."""
    default = resolve(DEFAULT_MODEL, gpu=PRETENDED)
    try:
        return judged(plan or default, card)
    except FitCheckError:
        return judged(default, card)


class Detected(Message):
    """What this computer has."""

    def __init__(self, found: machine.Machine) -> None:
        super().__init__()
        self.found = found


class Priced(Message):
    """What a notch of each knob costs."""

    def __init__(self, plan: Plan, found: dict[str, Price]) -> None:
        super().__init__()
        self.plan = plan
        self.found = found


class Advised(Message):
    """What would help a plan."""

    def __init__(self, plan: Plan, found: list[Tip]) -> None:
        super().__init__()
        self.plan = plan
        self.found = found


class Asking(App[None]):
    """One view at a time. Prices and advice are searched in a thread after the answer's paint."""

    def __init__(
        self, plan: Plan | None, kept: State, watch_machine: bool, found: machine.Machine | None
    ) -> None:
        super().__init__()
        self.watch_machine = watch_machine
        self.found = found
        self.past: list[View] = []
        self.advised: tuple[Plan | None, list[Tip]] = (None, [])
        self.priced: dict[str, Price] = {}
        self.priced_plan: Plan | None = None
        self.later: Timer | None = None
        live = watch_machine and plan is None and kept.live
        self.view = first_view(plan or kept.plan, views.DETECTING if live else views.PRETENDED)

    def on_mount(self) -> None:
        if self.watch_machine:
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

    def action_go_home(self) -> None:
        """Judge this machine's own card."""
        if self.found is None or machine.best(self.found) is None:
            self.notify("no GPU was found here")
            return
        view = self.at_home(self.view.plan)
        self.attempt(lambda: view.plan, view.card)

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

    def notify(self, *message: Any, **settings: Any) -> None:
        """One word at a time: a stack of them would cover the answer."""
        self.clear_notifications()
        super().notify(*message, **settings)

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
        self.post_message(Priced(plan, prices(plan)))
        self.post_message(Advised(plan, tips(plan)))

    def on_priced(self, message: Priced) -> None:
        self.priced, self.priced_plan = message.found, message.plan
        self.screen_stack[0].query_one("#knobs", Lines).redraw()

    def on_advised(self, message: Advised) -> None:
        self.advised = (message.plan, message.found)
        self.screen_stack[0].query_one("#answer", Lines).redraw()

    def action_apply(self, key: int) -> None:
        """Apply one of the five tips."""
        found, stale = self.advice
        if stale:
            self.notify("still searching what would help")
        elif key <= len(found):
            self.attempt(lambda: found[key - 1].plan)

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
