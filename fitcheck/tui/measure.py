"""Measure: the real step on this machine in a subprocess, against what was predicted, by phase."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from signal import SIGINT
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size

from fitcheck.errors import FitCheckError
from fitcheck.here import Here, plan_here
from fitcheck.measured import Measurement
from fitcheck.measured_text import facts
from fitcheck.tui import draw, process
from fitcheck.tui.dryrun import difference_lines
from fitcheck.tui.lines import Line, Lines, Span, apart, wrapped
from fitcheck.tui.page import Page
from fitcheck.tui.view import DETECTED, answered

if TYPE_CHECKING:
    from fitcheck.accuracy import Comparison
    from fitcheck.archive import File

STEPS = 2  # measured, after one to warm up: as `fitcheck bench` does


class Measure(Page):
    """Nothing runs until it is asked to; leaving the page ends what runs."""

    NAME = "measure"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("b", "start_or_stop", "start/stop"),
        Binding("s", "save", "save", tooltip="save the measurement"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.here: Here | None = None
        self.child: asyncio.subprocess.Process | None = None
        self.done: list[tuple[str, int]] = []
        self.begun = 0.0
        self.fault: FitCheckError | None = None
        self.saved = ""
        self.near: list[Comparison] = []
        self.own: list[tuple[str, File]] = []

    def compose(self) -> ComposeResult:
        yield Lines(lambda size: self.heading(size.width), classes="one title")
        yield Lines(lambda size: self.state(size.width), id="state", classes="one")
        yield Lines(self.body, id="page")
        yield self.keys()

    def on_mount(self) -> None:
        self.set_interval(0.5, self.tick)
        self.look()

    @property
    def running(self) -> bool:
        return self.child is not None

    @property
    def result(self) -> Measurement | None:
        """The last measurement of this session."""
        return self.fitcheck.measurements[-1] if self.fitcheck.measurements else None

    def heading(self, room: int) -> list[Line]:
        plan = self.here.plan if self.here else self.fitcheck.view.plan
        return self.named("MEASURE", draw.asked(plan), room)

    async def on_unmount(self) -> None:
        await process.settled(w for w in self.workers if w.group == "measure" and w.node is self)

    def tick(self) -> None:
        if self.running:
            self.query_one("#state", Lines).redraw()

    @work(thread=True, exclusive=True, group="records")
    def look(self) -> None:
        """Read what is on record; pydantic and the files' fits take their time."""
        from fitcheck.tui import records

        plan = self.fitcheck.view.plan
        try:
            near, own = records.nearest(plan), records.own_runs()
        except FitCheckError as fault:
            self.app.call_from_thread(self.fitcheck.refuse, fault)
            return
        self.app.call_from_thread(self.on_records, near, own)

    def on_records(self, near: list[Comparison], own: list[tuple[str, File]]) -> None:
        self.near, self.own = near, own
        self.redraw()

    def action_start_or_stop(self) -> None:
        """Start; or ask what runs to end at its next phase, which still reports what it has."""
        if self.child is not None:
            self.child.send_signal(SIGINT)
        elif not self.fitcheck.may_measure:
            words = "measuring is off in a served session"
            self.fitcheck.refuse(FitCheckError(words, "fitcheck --serve --allow-measure"))
        elif said := process.missing():
            self.fitcheck.refuse(FitCheckError(said.partition(":")[0], said.partition(": ")[2]))
        else:
            self.measure()

    def question(self) -> Here:
        """The plan on this machine's card; without one, a small plan of that method on its CPU."""
        view = self.fitcheck.view
        if self.fitcheck.found is not None and self.fitcheck.found.accelerators:
            fields = {name: getattr(view.plan, name) for name in view.plan.given}
            return plan_here(view.plan.model.id, {"method": view.plan.method, **fields})
        return plan_here(None, {"method": view.plan.method})

    @work(exclusive=True, group="measure")
    async def measure(self) -> None:
        """Read the subprocess until its report; leaving the page ends both."""
        self.done, self.fault, self.saved, self.begun = [], None, "", time.monotonic()
        try:
            self.here = await asyncio.to_thread(self.question)
            plan, environment = self.here
            options = [f"--steps={STEPS}"]
            async with aclosing(
                process.lines("measure", plan, options, environment, self.started)
            ) as told:
                async for said in told:
                    if "phase" in said:
                        self.done.append((said["phase"], said["step"]))
                    if "report" in said:
                        self.fitcheck.measurements.append(
                            Measurement.from_json(said["report"], plan)
                        )
                    self.redraw()
        except FitCheckError as fault:
            self.fault = fault
        finally:
            self.child = None
            if self.is_attached:
                self.redraw()

    def started(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.redraw()

    def action_save(self) -> None:
        """Keep the measurement as a file: it then counts for the stated errors."""
        if self.result is None:
            self.notify("nothing was measured yet: b measures")
        else:
            self.save(self.result)

    @work(thread=True, exclusive=True, group="save")
    def save(self, result: Measurement) -> None:
        from fitcheck import archive

        try:
            content = archive.record(result, answered(result.report.plan), None)
            self.saved = str(archive.save(content))
        except FitCheckError as fault:
            self.app.call_from_thread(self.fitcheck.refuse, fault)
            return
        self.app.call_from_thread(self.look)

    def state(self, room: int) -> list[Line]:
        """What runs, or the verdict of what ran."""
        if self.running:
            phase, step = self.done[-1] if self.done else ("starting", 0)
            spent = time.monotonic() - self.begun
            line = [Span(" ● ", "warn"), Span(f"step {step} of {STEPS + 1}  {phase}")]
            line.append(Span(f"  {spent:.0f} s", "dim"))
            return [apart(line, [Span("b stops ", "dim")], room)]
        if self.result is not None:
            return draw.verdict(self.result.report, room)
        return [[Span(" nothing measured yet", "dim"), Span("  b measures", "dim")]]

    def body(self, size: Size) -> list[Line]:
        room = size.width
        lines: list[Line] = []
        if self.fault is not None:
            lines += [[], *wrapped(f" ✗ {self.fault.message}", room - 2, "bad")]
            lines += [*wrapped(f"   {self.fault.hint or ''}", room - 2, "dim"), []]
        if self.result is not None:
            lines += self.outcome(self.result, room)
        else:
            lines += self.lesson(room)
        if self.near:
            from fitcheck.tui import records  # read by now

            lines += [[], *records.nearest_lines(self.near, self.fitcheck.view.plan, room)]
            lines += [[], *records.own_lines(self.own, room)]
        return lines

    def outcome(self, result: Measurement, room: int) -> list[Line]:
        """Predicted and measured by phase, and what that proves."""
        estimate = answered(result.report.plan)
        lines: list[Line] = []
        if estimate is not None and result.run.steps:
            lines += difference_lines(estimate, result.report, room, "measured")
        if result.oom is not None:
            said = f"ran out of memory in {result.oom.phase}, step {result.oom.step}"
            lines.append([Span(f" ✗ {said}: {result.oom.operator}", "bad")])
        lines.append([])
        for label, words in facts(result, estimate, None):
            text = wrapped(words, room - 11)
            lines.append([Span(f" {label:<9} ", "head"), *text[0]])
            lines += [[Span(" " * 11), *line] for line in text[1:]]
        if self.saved:
            lines += [[Span(" "), *line] for line in wrapped(f"✓ saved {self.saved}", room - 2)]
        return lines

    def lesson(self, room: int) -> list[Line]:
        """Before anything was measured: what b would do here."""
        app = self.fitcheck
        if app.found is not None and app.found.accelerators:
            words = (
                "b runs this plan's real step on this machine's card, three times, and reads the "
                "allocator's own counters by phase: a minute or so. Weights are random."
            )
            if app.view.card != DETECTED:
                words += " The card of the plan is pretended: this machine's own is measured."
        else:
            words = (
                "There is no GPU here. b runs a small step of this method on the CPU: it shows how "
                "a measurement goes, and proves nothing about a card."
            )
        return [[], *([Span(" "), *line] for line in wrapped(words, room - 2, "dim"))]
