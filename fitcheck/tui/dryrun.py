"""Dry run: the real step traced in a subprocess, its timeline, and where the estimate differs."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size

from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.report import ALLOCATED, Phase, Report
from fitcheck.tui import draw, process
from fitcheck.tui.lines import Line, Lines, Span, apart, wrapped
from fitcheck.tui.page import Page
from fitcheck.tui.timeline import Timeline, timeline_lines
from fitcheck.tui.view import estimated

NOTABLE = 0.02  # a difference worth a colour: twice what most phases are off


def allocated(phase: Phase) -> int:
    """What torch.cuda.max_memory_allocated() would say of a phase."""
    return max(moment.part(ALLOCATED) for moment in phase.moments)


def differences(estimate: Report, traced: Report) -> list[tuple[str, int | None, int]]:
    """(phase, estimated bytes, traced bytes) of peak allocated; None: the estimate lacks it."""
    guessed = {phase.name: allocated(phase) for phase in estimate.phases}
    rows = [(phase.name, guessed.get(phase.name), allocated(phase)) for phase in traced.phases]
    return [*rows, ("whole step", estimate.allocated_bytes, traced.allocated_bytes)]


def difference_lines(
    estimate: Report, traced: Report, room: int, rung: str = "dry run"
) -> list[Line]:
    """Estimate against dry run or measurement, by phase, with a bar of how far off."""
    head = f" {'PEAK ALLOCATED, GiB':<24}{'estimate':>10}{rung:>10}{'off':>9}"
    lines: list[Line] = [[Span(head, "head")]]
    for name, guess, seen in differences(estimate, traced):
        line = [Span(f" {name:<24}")]
        if guess is None:
            lines.append([*line, Span(f"{'-':>10}{seen / 2**30:>10.2f}")])
            continue
        off = guess / max(1, seen) - 1
        tone = "warn" if abs(off) > NOTABLE else "good"
        line.append(Span(f"{guess / 2**30:>10.2f}{seen / 2**30:>10.2f}"))
        line.append(Span(f"{100 * off:>+8.1f}%", tone))
        space = max(0, room - 56)
        line.append(Span("  " + "▎" * min(space, round(abs(off) * 200)), tone))
        lines.append(line)
    return lines


class DryRun(Page):
    """Runs when it is opened, ends when it is left; what was traced is kept."""

    NAME = "dry run"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "start_or_stop", "start/stop"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[str] = []
        self.begun = 0.0
        self.fault: FitCheckError | None = None
        self.running = False

    def on_mount(self) -> None:
        self.set_interval(0.5, self.tick)
        if self.plan not in self.fitcheck.traced:
            self.action_start_or_stop()

    @property
    def plan(self) -> Plan:
        return self.fitcheck.view.plan

    def compose(self) -> ComposeResult:
        yield Lines(lambda size: self.heading(size.width), classes="one title")
        yield Lines(lambda size: self.state(size.width), id="state", classes="one")
        yield Lines(self.body, id="page")
        yield self.keys()

    def heading(self, room: int) -> list[Line]:
        return self.named("DRY RUN", draw.asked(self.plan), room)

    async def on_unmount(self) -> None:
        await process.settled(w for w in self.workers if w.group == "trace" and w.node is self)

    def tick(self) -> None:
        if self.running:
            self.query_one("#state", Lines).redraw()

    def action_start_or_stop(self) -> None:
        """Start, or stop what runs."""
        if self.running:
            self.workers.cancel_group(self, "trace")
        elif said := process.missing():
            self.fault = FitCheckError(said.partition(":")[0], said.partition(": ")[2])
            self.redraw()
        else:
            self.trace()

    @work(exclusive=True, group="trace")
    async def trace(self) -> None:
        """Read the subprocess until its report; leaving the page ends both."""
        plan, timeline = self.plan, None
        self.phases, self.fault = [], None
        self.running, self.begun = True, time.monotonic()
        self.redraw()
        try:
            async with aclosing(process.lines("dryrun", plan, ["--timeline"])) as told:
                async for said in told:
                    if "phase" in said and said["phase"] not in self.phases[-1:]:
                        self.phases.append(said["phase"])
                        self.redraw()
                    if "timeline" in said:
                        timeline = Timeline.from_json(said["timeline"])
                    if "report" in said:
                        self.fitcheck.traced[plan] = (
                            Report.from_json(said["report"], plan),
                            timeline,
                        )
        except FitCheckError as fault:
            self.fault = fault
        finally:
            self.running = False
            if self.is_attached:
                self.redraw()

    def state(self, room: int) -> list[Line]:
        """What runs, or the verdict of what ran."""
        if self.running:
            spent = time.monotonic() - self.begun
            at = self.phases[-1] if self.phases else "starting"
            line = [Span(" ● ", "warn"), Span(f"tracing {at}"), Span(f"  {spent:.0f} s", "dim")]
            return [apart(line, [Span("d stops ", "dim")], room)]
        if self.plan in self.fitcheck.traced:
            return draw.verdict(self.fitcheck.traced[self.plan][0], room)
        return [[Span(" not run", "dim"), Span("  d starts it", "dim")]]

    def body(self, size: Size) -> list[Line]:
        room, rows = size.width, size.height
        if self.fault is not None:
            said = wrapped(f"✗ {self.fault.message}", room - 2, "bad")
            return [[], *said, *wrapped(self.fault.hint or "", room - 2, "dim")]
        if self.plan not in self.fitcheck.traced:
            return self.lesson(room)
        report, timeline = self.fitcheck.traced[self.plan]
        lines: list[Line] = []
        if timeline is not None and timeline.samples:
            lines += timeline_lines(timeline, room, max(9, min(22, rows - len(report.phases) - 4)))
            lines.append([])
        lines += difference_lines(estimated(self.plan), report, room)
        for note in report.notes:
            lines += [[], *([Span(" "), *line] for line in wrapped(note, room - 2))]
        return lines

    def lesson(self, room: int) -> list[Line]:
        """While there is nothing to show: what this is."""
        words = (
            "The step's real code runs on tensors without memory; every allocation is recorded and "
            "replayed through a model of PyTorch's allocator under this card's limit. It takes "
            "seconds and no GPU."
        )
        lines = [[], *([Span(" "), *line] for line in wrapped(words, room - 2, "dim")), []]
        done = [[Span("   ✓ ", "good"), Span(name)] for name in self.phases[:-1]]
        now = [[Span("   ● ", "warn"), Span(name)] for name in self.phases[-1:]]
        return [*lines, *done, *now]
