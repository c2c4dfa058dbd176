"""The app: it holds the view, the way back, and what works on every screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.events import DeliveryComplete, DeliveryFailed
from textual.message import Message
from textual.timer import Timer

from fitcheck import machine
from fitcheck.advice import command
from fitcheck.answer import DEFAULT_MODEL, PRETENDED, resolve
from fitcheck.errors import FitCheckError
from fitcheck.measured import Measurement
from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.tui import view as views
from fitcheck.tui.candidates import Candidate
from fitcheck.tui.compare import Compare
from fitcheck.tui.deliver import KINDS, Export, document, filename
from fitcheck.tui.draw import Price
from fitcheck.tui.dryrun import DryRun
from fitcheck.tui.explain import Explain
from fitcheck.tui.fit import Fit
from fitcheck.tui.guide import Guide
from fitcheck.tui.hardware import Hardware
from fitcheck.tui.knobs import notch, shown
from fitcheck.tui.lines import Lines
from fitcheck.tui.measure import Measure
from fitcheck.tui.page import Page
from fitcheck.tui.picker import Pick
from fitcheck.tui.state import MOST_PINS, State
from fitcheck.tui.timeline import Timeline
from fitcheck.tui.tips import Tip, tips
from fitcheck.tui.view import View, judged, prices

if TYPE_CHECKING:
    from textual.screen import Screen

PAUSE = 0.05  # seconds from the last key to the search for advice


def first_view(plan: Plan | None, card: str) -> View:
    """The view to begin with; where no plan is kept, or it is no longer covered, the default's."""
    default = resolve(DEFAULT_MODEL, gpu=PRETENDED)
    try:
        return judged(plan or default, card)
    except FitCheckError:
        return judged(default, card)


def bound(owner: type[App[None]] | type[Page]) -> list[Binding]:
    """The bindings that a class itself declares."""
    return [binding for binding in owner.BINDINGS if isinstance(binding, Binding)]


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


class FitCheckApp(App[None]):
    """plan: what to ask first. watch_machine: look at this computer, after the first paint.

    state: what an earlier session left; said: what is to be told about it. may_measure: whether
    this session may run a step on this machine's card.
    """

    CSS_PATH = "fitcheck.tcss"
    TITLE = "FitCheck"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "open('explain')", "explain", tooltip="every term, with its formula"),
        Binding("c", "open('compare')", "compare", tooltip="pin plans, see them side by side"),
        Binding("d", "open('dry run')", "dry run", tooltip="trace the real step, without a GPU"),
        Binding("b", "open('measure')", "measure", tooltip="run the real step here"),
        Binding("w", "open('hardware')", "hardware", tooltip="what this machine has"),
        Binding("y", "copy", "copy", tooltip="copy the command that asks this"),
        Binding("x", "open('export')", "export", tooltip="write the answer as a file"),
        Binding("question_mark", "show_help", "help", key_display="?"),
        Binding("ctrl+p", "command_palette", "all commands", show=False),
        Binding("q", "quit", "quit"),
    ]
    VIEWS: ClassVar[dict[str, type[Page]]] = {
        page.NAME: page for page in (Explain, Compare, DryRun, Measure, Hardware, Export, Guide)
    }

    def __init__(
        self,
        plan: Plan | None = None,
        found: machine.Machine | None = None,
        state: State | None = None,
        watch_machine: bool = False,
        said: str = "",
        may_measure: bool = True,
    ) -> None:
        super().__init__()
        kept = state or State()
        self.watch_machine = watch_machine
        self.said = said
        self.may_measure = may_measure
        self.found = found
        self.pins = list(kept.pins)
        self.past: list[View] = []
        self.traced: dict[Plan, tuple[Report, Timeline | None]] = {}
        self.measurements: list[Measurement] = []
        self.advised: tuple[Plan | None, list[Tip]] = (None, [])
        self.priced: dict[str, Price] = {}
        self.priced_plan: Plan | None = None
        self.later: Timer | None = None
        live = watch_machine and plan is None and kept.live
        self.view = first_view(plan or kept.plan, views.DETECTING if live else views.PRETENDED)
        if kept.theme in self.available_themes:
            self.theme = kept.theme

    def get_default_screen(self) -> Screen[object]:
        return Fit()

    def on_mount(self) -> None:
        if self.watch_machine:
            self.call_after_refresh(self.detect)
        if self.said:
            self.notify(self.said, title="Set aside", severity="warning", markup=False, timeout=15)
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

    def state(self) -> State:
        """What the next session begins with."""
        live = self.view.card != views.PRETENDED
        return State(self.view.plan, live, tuple(self.pins), self.theme)

    def card_of(self, plan: Plan) -> str:
        """Whether a plan's card is a live one: only such a card leaves less than the catalog's."""
        return views.DETECTED if plan.memory != plan.gpu.usable_memory() else views.PRETENDED

    def pin(self) -> None:
        """Keep the plan as it is beside others."""
        if self.view.plan in self.pins:
            self.notify("this plan is pinned already")
        elif len(self.pins) >= MOST_PINS:
            self.notify(f"{MOST_PINS} plans are pinned: x unpins one")
        else:
            self.pins.append(self.view.plan)
            self.redraw()

    def unpin(self, index: int) -> None:
        del self.pins[index]
        self.redraw()

    def action_open(self, name: str) -> None:
        """Another view, in the place of one that is open: escape leads home from everywhere."""
        page = self.VIEWS[name]
        if type(self.screen) in self.VIEWS.values():
            if not isinstance(self.screen, page):
                self.switch_screen(page())
        else:
            self.push_screen(page())

    def action_show_help(self) -> None:
        self.action_open("help")

    def all_bindings(self) -> list[tuple[str, list[Binding]]]:
        """Every view with its keys, for the help."""
        found = [("home", bound(Fit)), ("anywhere", bound(FitCheckApp))]
        return found + [(name, bound(page)) for name, page in self.VIEWS.items() if bound(page)]

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: every view, and what Textual offers for looks."""
        for binding in bound(FitCheckApp):
            if binding.action != "command_palette":
                yield SystemCommand(
                    binding.description.capitalize(),
                    binding.tooltip or binding.description,
                    partial(self.run_action, binding.action),
                )
        yield SystemCommand("Undo", "take the last change back", self.action_undo)
        yield SystemCommand("Reset", "the defaults of the method", self.action_reset)
        yield SystemCommand("This machine's card", "judge the card here", self.action_go_home)
        yield SystemCommand("Theme", "change the colours", self.action_change_theme)

    def action_copy(self) -> None:
        """Copy the command that asks this question; it reaches the clipboard over ssh too."""
        words = command(self.view.plan)
        self.copy_to_clipboard(words)
        self.notify(words, title="Copied", markup=False)

    def deliver(self, kind: str) -> None:
        """Write the answer as a file."""
        text = self.export_screenshot() if kind == "svg" else document(self.view, kind)
        self.deliver_text(
            StringIO(text), save_filename=filename(self.view, kind), mime_type=KINDS[kind][0]
        )

    def on_delivery_complete(self, event: DeliveryComplete) -> None:
        if event.path is not None:
            self.notify(str(event.path), title="Written", markup=False)

    def on_delivery_failed(self, event: DeliveryFailed) -> None:
        self.notify(str(event.exception), title="Not written", severity="error", markup=False)

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
