"""The app: it holds the view, the way back, and what works on every screen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.events import DeliveryComplete, DeliveryFailed

from fitcheck import machine
from fitcheck.advice import command
from fitcheck.errors import FitCheckError
from fitcheck.measured import Measurement
from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.tui import view as views
from fitcheck.tui.asking import Asking
from fitcheck.tui.candidates import Candidate
from fitcheck.tui.compare import Compare
from fitcheck.tui.deliver import KINDS, Export, document, filename
from fitcheck.tui.dryrun import DryRun
from fitcheck.tui.explain import Explain
from fitcheck.tui.fit import Fit
from fitcheck.tui.guide import Guide
from fitcheck.tui.hardware import Hardware
from fitcheck.tui.measure import Measure
from fitcheck.tui.page import Page
from fitcheck.tui.picker import Pick
from fitcheck.tui.state import MOST_PINS, State
from fitcheck.tui.timeline import Timeline

if TYPE_CHECKING:
    from textual.screen import Screen

PAUSE = 0.05  # seconds from the last key to the search for advice


def bound(owner: type[App[None]] | type[Page]) -> list[Binding]:
    """The bindings that a class itself declares."""
    return [binding for binding in owner.BINDINGS if isinstance(binding, Binding)]


class FitCheckApp(Asking):
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
        kept = state or State()
        super().__init__(plan, kept, watch_machine, found)
        self.said = said
        self.may_measure = may_measure
        self.pins = list(kept.pins)
        self.traced: dict[Plan, tuple[Report, Timeline | None]] = {}
        self.measurements: list[Measurement] = []
        if kept.theme in self.available_themes:
            self.theme = kept.theme

    def get_default_screen(self) -> Screen[object]:
        return Fit()

    def on_mount(self) -> None:
        if self.said:
            self.notify(self.said, title="Set aside", severity="warning", markup=False, timeout=15)

    def action_choose(self, field: str) -> None:
        """Pick a value of a field from all there are."""

        def picked(candidate: Candidate | None) -> None:
            if candidate is not None:
                self.take(field, candidate)

        self.push_screen(Pick(self.view.plan, field), picked)

    def take(self, field: str, candidate: Candidate) -> None:
        """Put what was picked into the plan; what is not of the catalog is read in a thread."""
        if candidate.away:
            self.notify(candidate.id, title="Reading", markup=False, timeout=60)
            self.fetch(candidate)
            return
        card = views.PRETENDED if field == "gpu" else None
        self.attempt(lambda: candidate.change(self.view.plan), card)

    @work(thread=True, exclusive=True, group="fetch")
    def fetch(self, candidate: Candidate) -> None:
        """Read a model of the Hub or of a file: its configuration and headers, no weights."""
        before = self.view.plan
        try:
            plan = candidate.change(before)
        except FitCheckError as fault:
            self.call_from_thread(self.refuse, fault)
            return
        self.call_from_thread(self.fetched, before, plan)

    def fetched(self, before: Plan, plan: Plan) -> None:
        """Show it, unless the plan was changed while it was read."""
        self.clear_notifications()
        if self.view.plan == before:
            self.attempt(lambda: plan)
        else:
            self.notify(f"{plan.model.id} was read, but the plan has changed meanwhile")

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
        found.append(("all values of a field", bound(Pick)))
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
