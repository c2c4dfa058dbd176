"""What a step takes on a real device, phase by phase: seconds, and the memory of its tensors.

    meter = meter_for(device)
    with AllocatorMeter(device, watch) as meter:
        with meter.phase("load"):
            roles = build(plan, device)
        meter.begin()
        run_step(plan, roles, meter)    # and again, as often as is wanted
    meter.spans()                       # one for each stretch of a phase

An accelerator with PyTorch's caching allocator (CUDA, ROCm, XPU) is asked for that allocator's own
counters. A CPU and MPS have none that tell a peak: there every tensor is counted as it appears and
goes, by the tracer of the dry run, and the allocator's model says what they would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, Self

import torch

from fitcheck.bench import operators
from fitcheck.bench.allocator import Allocator, OutOfMemory
from fitcheck.bench.device import used_bytes
from fitcheck.bench.recorder import Recorder
from fitcheck.bench.tracer import Tracer
from fitcheck.kernels import Card
from fitcheck.measured import Oom

NOWHERE = "-"  # between phases
Watch = Callable[[str, int], None]


class Span(NamedTuple):
    """A stretch of one phase; peaks are those within it, what it began with included. Bytes."""

    step: int  # 0 is loading
    phase: str
    seconds: float
    allocated: int  # when it ended
    reserved: int
    peak_allocated: int
    peak_reserved: int
    used: int | None  # of the whole card, by its driver, when it ended


class Meter(Recorder):
    """Marks where phases begin and end; subclasses know the memory.

    watch: called with each phase's name and step as it begins; what it raises ends the step there,
    between two operators and never within one.
    """

    def __init__(self, device: torch.device, watch: Watch) -> None:
        self.device = device
        self.watch = watch
        self.step = 0
        self.retries = 0  # how often the allocator gave back its cache; known with the spans
        self.stack = [NOWHERE]  # of the phases that run
        self.began = time.perf_counter()

    def __enter__(self) -> Self:
        self.boundary()
        return self

    def __exit__(self, *fault: object) -> None:
        pass

    def begin(self) -> None:
        """The next step begins here."""
        self.boundary()
        self.step += 1

    @property
    def now(self) -> str:
        """The phase that runs; the one that failed, after an exception came out of it."""
        return self.stack[-1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.boundary()
        self.stack.append(name)
        self.watch(name, self.step)
        yield  # an exception leaves the phase on the stack: it is the one that failed
        self.boundary()
        self.stack.pop()

    def decode(self, steps: range) -> Iterator[int]:
        for step in steps:
            yield step
            self.watch(self.now, self.step)

    def boundary(self) -> None:
        """One stretch ends and the next begins."""
        raise NotImplementedError

    def spans(self) -> list[Span]:
        """All stretches so far, in order."""
        raise NotImplementedError


class AllocatorMeter(Meter):
    """The caching allocator's own counters, and the driver's word on the whole card."""

    def __init__(self, device: torch.device, watch: Watch) -> None:
        super().__init__(device, watch)
        self.found: list[Span] = []

    def boundary(self) -> None:
        accelerator = torch.accelerator
        accelerator.synchronize(self.device)
        now = time.perf_counter()
        span = Span(
            *(self.step, self.now, now - self.began),
            *(accelerator.memory_allocated(self.device), accelerator.memory_reserved(self.device)),
            accelerator.max_memory_allocated(self.device),
            accelerator.max_memory_reserved(self.device),
            used_bytes(self.device) if len(self.stack) == 2 else None,  # as an outermost ends
        )
        self.found.append(span)
        accelerator.reset_peak_memory_stats(self.device)
        self.began = time.perf_counter()

    def spans(self) -> list[Span]:
        self.retries = int(torch.accelerator.memory_stats(self.device).get("num_alloc_retries", 0))
        return self.found

    def empty_cache(self) -> None:
        torch.accelerator.empty_cache()


class Counted(Tracer):
    """The tracer of the dry run over the real tensors of one device.

    No CUDA kernel runs, so their hidden workspaces are those that the dry run takes them to have.
    """

    def __init__(self, device: torch.device, card: Card) -> None:
        super().__init__(card)
        self.device_type = device.type
        self.nobody_else = operators.nobody_else()

    def watches(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device_type

    def made(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        return func(*args, **kwargs)  # its values are wanted


class CountingMeter(Meter):
    """Every tensor counted as it appears and goes; the caching allocator's model does the rest.

    limit: bytes that this allocator may take from the card that is pretended.
    """

    def __init__(
        self, device: torch.device, watch: Watch, card: Card, limit: int | None = None
    ) -> None:
        super().__init__(device, watch)
        self.tracer = Counted(device, card)
        self.limit = limit
        self.stretches: list[tuple[int, str, float, int]] = []  # step, phase, seconds, last event
        self.oom: Oom | None = None

    def __enter__(self) -> Self:
        self.tracer.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()

    def __exit__(self, *fault: object) -> None:
        self.tracer.__exit__(*fault)  # type: ignore[no-untyped-call]

    def boundary(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = time.perf_counter() - self.began
        self.stretches.append((self.step, self.now, seconds, len(self.tracer.events)))
        self.began = time.perf_counter()

    def empty_cache(self) -> None:
        self.tracer.events.append((-1, 0))

    def spans(self) -> list[Span]:
        """Ends where memory would have run out; `oom` then says how."""
        allocator, blocks, found = Allocator(self.limit), dict[int, int](), list[Span]()
        events = iter(self.tracer.events)
        begin, name = 0, 0
        for step, phase, seconds, end in self.stretches:
            allocator.reset_peaks()
            fault = None
            try:
                for size, name in islice(events, end - begin):
                    if size > 0:
                        blocks[name] = allocator.malloc(size)
                    elif size == 0:
                        allocator.free(blocks.pop(name))
                    else:
                        allocator.empty_cache()
            except OutOfMemory as raised:
                fault = raised
            span = Span(
                *(step, phase, seconds, allocator.allocated, allocator.reserved),
                *(allocator.peak_allocated, allocator.peak_reserved, used_bytes(self.device)),
            )
            found.append(span)
            begin = end
            if fault is not None:
                operator = str(self.tracer.made_by[name])
                self.oom = Oom(phase, step, operator, fault.requested, fault.free)
                break
        self.retries = allocator.retries
        return found
