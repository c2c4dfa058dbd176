"""Hardware: what this machine has, its live use, what holds memory; and what is pretended."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message

from fitcheck import machine
from fitcheck.machine import Accelerator, Machine
from fitcheck.text import gib
from fitcheck.tui.knobs import card_name
from fitcheck.tui.lines import Line, Span, apart, cut, wrapped
from fitcheck.tui.page import Page
from fitcheck.tui.view import DETECTED

EVERY = 2.0  # seconds between two looks at the drivers
HISTORY = 120
BLOCKS = " ▁▂▃▄▅▆▇█"


def sparkline(shares: list[float], room: int) -> str:
    """The last shares of a whole, 0 to 1, as blocks; what is in use at all shows."""
    shown = shares[-room:]
    return "".join(BLOCKS[max(share > 0, min(8, round(share * 8)))] for share in shown)


class Seen(Message):
    """A look at this machine, and the names of what holds memory, card by card."""

    def __init__(self, found: Machine, holders: list[list[tuple[str, int | None]]]) -> None:
        super().__init__()
        self.found = found
        self.holders = holders


class Hardware(Page):
    """Looks every two seconds, in a thread: a driver may take its time."""

    NAME = "hardware"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("g", "app.choose('gpu')", "pretend a card"),
        Binding("plus,equals_sign", "count(1)", "count", key_display="+ -"),
        Binding("minus", "count(-1)", "count", show=False),
        Binding("t", "app.go_home", "this machine's card"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.found: Machine | None = None
        self.holders: list[list[tuple[str, int | None]]] = []
        self.uses: dict[str, deque[float]] = {}

    def on_mount(self) -> None:
        self.found = self.fitcheck.found
        if self.fitcheck.watch_machine:
            self.look()
            self.set_interval(EVERY, self.look)

    @work(thread=True, exclusive=True, group="look")
    def look(self) -> None:
        found = machine.detect()
        named = [
            [(holder.name or "a process", holder.bytes) for holder in machine.holders(card)]
            for card in found.accelerators
        ]
        self.post_message(Seen(found, named))

    def on_seen(self, message: Seen) -> None:
        self.found, self.holders = message.found, message.holders
        self.fitcheck.found = message.found
        for card in message.found.accelerators:
            self._use(f"{card.vendor} {card.index}", card.used_bytes / max(1, card.total_bytes))
        if ram := message.found.ram:
            self._use("RAM", 1 - ram.available_bytes / max(1, ram.total_bytes))
        self.redraw()

    def _use(self, name: str, share: float) -> None:
        self.uses.setdefault(name, deque(maxlen=HISTORY)).append(share)

    def action_count(self, step: int) -> None:
        """One card more or less."""
        self.fitcheck.turn("gpus", step)

    def heading(self, room: int) -> list[Line]:
        return self.named("HARDWARE", self.found.system if self.found else "looking…", room)

    def body(self, size: Size) -> list[Line]:
        room = size.width
        lines = [*self.judged(room), []]
        if self.found is None:
            return [*lines, [Span(" looking at this machine…", "dim")]]
        for at, card in enumerate(self.found.accelerators):
            lines += [*self.card(card, at, room), []]
        if not self.found.accelerators:
            lines += [[Span(" THIS MACHINE", "head")], [Span(" No GPU was found here.")]]
            words = (
                "Any card of the catalog can be pretended: g chooses one. If there is a card, "
                "`fitcheck machine --doctor` shows what was asked and answered."
            )
            lines += [*([Span(" "), *line] for line in wrapped(words, room - 2, "dim")), []]
        lines += self.ram(room)
        for note in self.found.notes:
            lines += [[Span(" "), *line] for line in wrapped(note, room - 2, "dim")]
        return lines

    def judged(self, room: int) -> list[Line]:
        """The card of the plan."""
        view = self.fitcheck.view
        plan = view.plan
        kind = "this machine's" if view.card == DETECTED else "pretended"
        name = f" {plan.gpus} × {plan.gpu.name} "
        head = [Span(" JUDGED ", "head"), Span(name, "bold"), Span(kind, "dim")]
        usable = [Span(f"{gib(plan.memory.usable_bytes)} GiB usable ", "mark")]
        lines = [apart(head, usable, room)]
        lines += [[Span(" "), *line] for line in wrapped(plan.memory.why, room - 2, "dim")]
        rates = [
            (plan.gpu.bandwidth_gbs, "GB/s"),
            (plan.gpu.bf16_dense_tflops, "TFLOP/s bf16"),
            (plan.gpu.tdp_w, "W"),
        ]
        told = " · ".join(f"{rate:,.0f} {unit}" for rate, unit in rates if rate)
        doubt = f" · unverified: {plan.gpu.doubt}" if plan.gpu.doubt else ""
        return [*lines, [Span(cut(f" {told}{doubt}", room), "dim")]]

    def card(self, card: Accelerator, at: int, room: int) -> list[Line]:
        """One card of this machine: use now, its history, who holds memory."""
        name = f"{card.vendor} {card.index}"
        catalog = card_name(card.gpu) if card.gpu else "not in the catalog"
        head = [Span(f" {name.upper()} ", "head"), Span(card.name, "bold")]
        lines = [apart(head, [Span(f"{catalog} ", "dim")], room)]
        usable = card.usable
        free, total = usable.usable_bytes, usable.total_bytes
        lines.append(meter(1 - free / max(1, total), f"{gib(free)} of {gib(total)} GiB free", room))
        if past := self.uses.get(name):
            lines.append([Span(" "), Span(sparkline([*past], room - 2), "c0")])
        for who, size in self.holders[at] if at < len(self.holders) else []:
            held = f"{gib(size)} GiB" if size is not None else "size not told"
            lines.append([Span(f"   {held:>10}  ", "bold"), Span(cut(who, room - 16))])
        return lines

    def ram(self, room: int) -> list[Line]:
        """The host's memory."""
        ram = self.found.ram if self.found else None
        if ram is None:
            return [[Span(" RAM ", "head"), Span("unknown", "dim")]]
        free = ram.usable_bytes
        words = f"{gib(free)} of {gib(ram.total_bytes)} GiB free"
        lines = [[Span(" RAM", "head")], meter(1 - free / max(1, ram.total_bytes), words, room)]
        if past := self.uses.get("RAM"):
            lines.append([Span(" "), Span(sparkline([*past], room - 2), "c2")])
        report = self.fitcheck.view.report
        need = f" the plan needs {gib(report.ram.peak_bytes)} GiB of it ({report.ram.phase})"
        return [*lines, [Span(cut(need, room), "dim")]]


def meter(share: float, words: str, room: int) -> Line:
    """A bar of how full something is, and the same in words."""
    space = max(4, room - len(words) - 4)
    full = round(min(1.0, max(0.0, share)) * space)
    tone = "bad" if share > 0.9 else "warn" if share > 0.6 else "good"
    return [
        Span(" "),
        Span("█" * full, tone),
        Span("·" * (space - full), "dim"),
        Span(f"  {words}"),
    ]
