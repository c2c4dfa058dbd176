"""The measurement: a plan's real step on this machine's device, read phase by phase.

    measurement = measure(plan, Wishes(steps=2))
    measurement.report.allocated_bytes, measurement.readings[0].seconds

It runs loading, one step to warm up (Adam's states appear in it), and the steps that are measured.
Running out of memory is a result, and so is what was measured until somebody stopped it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date

import torch

from fitcheck import kernels
from fitcheck.bench import roles, steps
from fitcheck.bench.device import (
    card_name,
    check_card,
    expandable,
    limit_to,
    module_names,
    this_device,
    used_bytes,
    versions,
)
from fitcheck.bench.dryrun import limit, outside_guess
from fitcheck.bench.meter import NOWHERE, AllocatorMeter, CountingMeter, Meter, Span, Watch
from fitcheck.bench.rates import bandwidth, mfu, tokens
from fitcheck.bench.weights import load_weights
from fitcheck.bench.witness import Witness, is_out_of_memory
from fitcheck.errors import FitCheckError
from fitcheck.fit import notes
from fitcheck.host import ram
from fitcheck.measured import Measurement, Oom, Reading, Run
from fitcheck.plan import Plan
from fitcheck.report import CACHED, OUTSIDE, Moment, Phase, Report, Term
from fitcheck.speed import measured_speed

WARMUP = 1
COUNTED = "counted: every tensor that the step made, in the allocator's blocks"


@dataclass(frozen=True, slots=True)
class Wishes:
    """steps: how many to measure; limit_bytes: of the allocator; weights: a Hub id or a folder."""

    steps: int = 2
    limit_bytes: int | None = None
    weights: str | None = None


def measure(plan: Plan, wishes: Wishes, watch: Watch | None = None) -> Measurement:
    """Run the plan's step and read what it takes.

    watch: called with each phase's name and step as it begins, and in each decode step; when it
    raises KeyboardInterrupt, what was measured so far is the result. Raises FitCheckError for a
    plan of another card, and for a model that cannot be built.
    """
    device = this_device()
    before = used_bytes(device)  # asked before this process has a context there
    check_card(plan, device)
    meter = _meter(plan, device, wishes, watch or (lambda phase, step: None))
    names: dict[int, str] = {}
    witness = Witness(names, limit_to(device, wishes.limit_bytes))
    oom = None
    torch.manual_seed(0)
    try:
        with meter:
            with meter.phase("load"):
                built = roles.build(plan, device)
                names |= module_names(built)
                if wishes.weights:
                    load_weights(built, wishes.weights)
            for _ in range(WARMUP + wishes.steps):
                meter.begin()
                steps.run_step(plan, built, meter)
            meter.begin()
    except RuntimeError as fault:
        if not is_out_of_memory(fault):
            raise
        oom = witness.oom(fault, meter.now, meter.step)
    except KeyboardInterrupt:
        pass
    return _measurement(plan, wishes, meter, oom, before)


def _meter(plan: Plan, device: torch.device, wishes: Wishes, watch: Watch) -> Meter:
    if plan.method not in steps.STEPS:
        raise FitCheckError(
            f"{plan.method} cannot be measured yet", f"what can: {', '.join(steps.STEPS)}"
        )
    if plan.gpus * plan.nodes > 1:
        raise FitCheckError("a measurement runs on one card", "leave out --gpus and --nodes")
    if plan.rollout not in (None, "transformers"):
        raise FitCheckError(
            f"a measurement does not start {plan.rollout}",
            "--rollout transformers, or fitcheck check",
        )
    if device.type in ("cuda", "xpu"):
        return AllocatorMeter(device, watch)
    if device.type == "cpu":  # little work, no speed to measure: more would wait for each other
        torch.set_num_threads(1)
    room = limit(plan) if wishes.limit_bytes is None else wishes.limit_bytes
    return CountingMeter(device, watch, kernels.card(plan.gpu), room)


def _measurement(
    plan: Plan, wishes: Wishes, meter: Meter, oom: Oom | None, before: int | None
) -> Measurement:
    """The stretches that were measured, phase by phase."""
    spans = meter.spans()
    if isinstance(meter, CountingMeter) and meter.oom is not None:
        oom = meter.oom
    done = max(0, (oom.step if oom else meter.step) - 1 - WARMUP)  # steps that came to their end
    kept = spans
    if done and not oom:
        kept = [s for s in spans if s.phase == "load" or WARMUP < s.step <= WARMUP + done]
    readings = tuple(_readings(plan, kept, max(1, done), before))
    if not readings:
        raise FitCheckError("stopped", "nothing was measured yet")
    run = Run(
        device=meter.device.type,
        card=card_name(meter.device),
        versions=versions(),
        date=date.today().isoformat(),
        warmup=WARMUP,
        steps=done,
        asked=wishes.steps,
        retries=meter.retries,
        seconds=sum(s.seconds for s in kept if s.phase != "load") / max(1, done),
        expandable=expandable(),
        limit_bytes=wishes.limit_bytes,
        weights="loaded" if wishes.weights else "random",
    )
    phases = tuple(_phase(plan, reading, run) for reading in readings)
    report = Report(
        plan,
        phases,
        ram(plan),
        source="measured",
        speed=measured_speed(plan, phases) if done and run.on_card else None,
        notes=tuple([*notes(plan), *_said(plan, run, oom)]),
        outcome="does-not-fit" if oom else "tight" if run.retries else "fits",
    )
    return Measurement(report, run, readings, oom)


def _readings(
    plan: Plan, spans: Sequence[Span], steps: int, before: int | None
) -> Iterator[Reading]:
    """Each phase in the order of its first stretch: its highest bytes, its seconds in one step."""
    updates = _seconds_of_updates(spans)
    for phase in dict.fromkeys(span.phase for span in spans if span.phase != NOWHERE):
        own = [span for span in spans if span.phase == phase]
        seconds = sum(span.seconds for span in own) / (1 if phase == "load" else steps)
        used = max((s.used for s in own if s.used is not None), default=None)
        outside = None
        if before is not None and used is not None:
            outside = max(s.used - before - s.reserved for s in own if s.used is not None)
        count, update = tokens(plan, phase), phase.rpartition(".")[0]
        yield Reading(
            *(phase, seconds, own[-1].allocated, own[-1].reserved),
            *(max(s.peak_allocated for s in own), max(s.peak_reserved for s in own)),
            *(used, None if outside is None else max(0, outside)),
            tokens_per_second=count / seconds if count and seconds else None,
            mfu=mfu(plan, update, updates[update] / steps) if update in updates else None,
            bandwidth=bandwidth(plan, seconds) if phase.endswith("decode") else None,
        )


def _seconds_of_updates(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of each update with all its phases: "update.policy", or "update"."""
    sums: dict[str, float] = {}
    for span in spans:
        if span.phase.startswith("update"):
            name = span.phase.rpartition(".")[0]
            sums[name] = sums.get(name, 0.0) + span.seconds
    return sums


def _phase(plan: Plan, reading: Reading, run: Run) -> Phase:
    """A reading as a phase of a Report."""
    peak, reserved = reading.peak_allocated_bytes, reading.peak_reserved_bytes
    read = "torch's own counter" if run.on_card else COUNTED
    outside, whence = reading.outside_bytes, "the driver's reading less the allocator's"
    if outside is None:
        outside, whence = outside_guess(plan), "not measured: taken from the estimate"
    terms = (
        Term("tensors", "step", peak, read),
        Term("cache", "card", reserved - peak, "reserved, not used", CACHED),
        Term("CUDA context", "card", outside, whence, OUTSIDE),
    )
    return Phase(reading.phase, (Moment("largest", terms),), reading.seconds)


def _said(plan: Plan, run: Run, oom: Oom | None) -> Iterator[str]:
    """What happened, and what of the answer was not verified."""
    if oom is not None:
        asked = "" if oom.requested_bytes is None else f", asking for {oom.requested_bytes:,} B"
        free = "" if oom.free_bytes is None else f" with {oom.free_bytes:,} B free"
        yield f"ran out of memory in {oom.phase}, step {oom.step}{asked}{free}: {oom.operator}"
    elif run.steps < run.asked:
        yield f"stopped: {run.steps} of {run.asked} steps were measured"
    if run.retries and oom is None:
        yield f"succeeded only because the allocator emptied its cache {run.retries} times"
    if not run.on_card:
        yield (
            f"ran on {run.card}, as if it were an empty {plan.gpu.name}: which tensors live when "
            "is verified; the card's kernels, their workspaces, its allocator, what lies outside "
            "of it, and speed are not"
        )
