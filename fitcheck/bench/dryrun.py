"""The dry run: a plan's real step traced on meta tensors, replayed through the allocator's rules.

    report, traced = dry_run(plan)
    report.source, report.allocated_bytes, report.verdict     # "dry-run", ...

The verdict is the replay's outcome under the card's real limit: it succeeds, succeeds only after
the allocator gave its cache back (tight), or runs out of memory at an operator of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitcheck import kernels
from fitcheck.bench.allocator import Allocator
from fitcheck.bench.device import expandable
from fitcheck.bench.replay import Replay, replay
from fitcheck.bench.samples import Sample, samples
from fitcheck.bench.snapshot import write_snapshot
from fitcheck.bench.timeline import timeline_html, timeline_svg
from fitcheck.bench.trace import NOWHERE, Trace, trace
from fitcheck.fit import notes
from fitcheck.host import ram
from fitcheck.plan import Plan
from fitcheck.report import CACHED, OUTSIDE, Error, Moment, Phase, Report, Term
from fitcheck.speed import step_speed, timed
from fitcheck.text import headline


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happens under a limit: fits, tight or does-not-fit; at which event memory ran out."""

    verdict: str
    retries: int
    oom: int | None


def dry_run(
    plan: Plan, error: Error | None = None, progress: Callable[[str], None] | None = None
) -> tuple[Report, Trace]:
    """The Report of a traced step, and the trace; FitCheckError for a model that cannot be built.

    Expandable segments are replayed where PYTORCH_ALLOC_CONF asks for them, as a run here would.
    progress: called with the name of each phase as it begins to be traced.
    """
    traced = trace(plan, progress=progress)
    settings = expandable()
    free = replay(
        traced.events, Allocator(expandable_segments=settings), traced.marks, traced.rounds
    )
    outcome = Outcome("fits", 0, None)
    if free.peak_reserved > limit(plan):  # else the same replay would end the same
        outcome = under_limit(traced, limit(plan), settings)
    said = [*notes(plan), *_said(plan, traced, outcome)]
    phases = timed(plan, tuple(_phases(traced, free)))
    report = Report(
        plan,
        phases,
        ram(plan),
        source="dry-run",
        error=error,
        notes=tuple(dict.fromkeys(said)),
        outcome=outcome.verdict,
        speed=step_speed(plan, phases),
    )
    return report, traced


def snapshot(traced: Trace, path: Path) -> None:
    """PyTorch's own memory snapshot of the replay, for pytorch.org/memory_viz."""
    notes = {begin: f"{phase}, step {step + 1}" for begin, _, step, phase in traced.phases()}
    write_snapshot(path, traced.events, Allocator(limit(traced.plan)), notes=notes)


def drawn(traced: Trace, page: bool) -> str:
    """The timeline of the traced steps by role, under the card's limit, as SVG or as a page."""
    draw = timeline_html if page else timeline_svg
    return draw(
        points(traced),
        limit_bytes=limit(traced.plan),
        marks=traced.marks,
        title=headline(traced.plan),
        length=len(traced.events),
        oom=under_limit(traced, limit(traced.plan)).oom,
    )


def points(traced: Trace) -> list[Sample]:
    """The fullest moment of each column of a timeline, by role."""
    names = {name: holder.role or "step" for name, holder in traced.lasting.items()}
    return samples(traced.events, names, Allocator(), traced.marks)


def timeline(traced: Trace) -> dict[str, Any]:
    """The same timeline as data: what the screen draws, with terminal cells."""
    return {
        "samples": [(event, dict(roles)) for event, roles, _ in points(traced)],
        "marks": traced.marks,
        "limit_bytes": limit(traced.plan),
        "oom": under_limit(traced, limit(traced.plan)).oom,
    }


def limit(plan: Plan) -> int:
    """What the allocator may take from the driver: usable memory less what lies outside of it."""
    return max(0, plan.memory.usable_bytes - outside_guess(plan))


def outside_guess(plan: Plan) -> int:
    """What the CUDA context is taken to hold, outside the allocator."""
    return kernels.CONTEXT if plan.gpu.vendor != "apple" else 0


def under_limit(traced: Trace, limit_bytes: int, segments: bool = False) -> Outcome:
    """The sharp question, asked of the allocator itself."""
    whole = max(limit_bytes, traced.plan.gpu.usable_memory().total_bytes)
    allocator = Allocator(limit_bytes, total_bytes=whole, expandable_segments=segments)
    result = replay(traced.events, allocator, traced.marks, traced.rounds)
    if result.oom is not None:
        return Outcome("does-not-fit", result.retries, result.oom)
    return Outcome("tight" if result.retries else "fits", result.retries, None)


def _said(plan: Plan, traced: Trace, outcome: Outcome) -> list[str]:
    if outcome.oom is not None:
        size, name = traced.events[outcome.oom]
        phase = phase_at(traced, outcome.oom)
        return [f"runs out of memory in {phase}, asking for {size:,} B: {traced.maker(name)}"]
    if outcome.retries:
        return [f"succeeds only because the allocator empties its cache {outcome.retries} times"]
    return []


def phase_at(traced: Trace, index: int) -> str:
    """The phase of an event."""
    found = NOWHERE
    for begin, name in traced.marks:
        if begin > index:
            break
        found = name if name != NOWHERE else found
    return found


def _phases(traced: Trace, free: Replay) -> list[Phase]:
    """Each phase of the last step (and loading) at its largest moment."""
    last = traced.starts[-1] if traced.starts else 0
    peaks: dict[str, tuple[int, int]] = {}
    for (index, name), peak in zip(traced.marks, free.marks, strict=False):
        if name == NOWHERE or (index < last and name != "load"):
            continue
        allocated, reserved = peaks.pop(name, (0, 0))  # in the order in which they end
        peaks[name] = (max(allocated, peak.allocated), max(reserved, peak.reserved))
    events = {
        phase: at
        for (step, phase), at in traced.peaks().items()
        if phase in peaks and (step == len(traced.starts) - 1 or phase == "load")
    }
    order = sorted(events, key=events.__getitem__)
    holders = dict(zip(order, traced.held([events[phase] for phase in order]), strict=True))
    found = []
    for phase in (p for p in peaks if p in holders):
        allocated, reserved = peaks[phase]
        terms = [
            Term(holder.kind, holder.role, size, holder.what or "traced")
            for holder, size in sorted(holders[phase].items(), key=lambda item: -item[1])
        ]
        rest = allocated - sum(term.bytes for term in terms)
        terms.append(Term("allocator rounding", "card", rest, "blocks larger than what was asked"))
        terms.append(Term("cache", "card", reserved - allocated, "reserved, not used", CACHED))
        terms.append(
            Term("CUDA context", "card", outside_guess(traced.plan), "an estimate", OUTSIDE)
        )
        found.append(Phase(phase, (Moment("largest", tuple(merged(terms))),)))
    return found


def merged(terms: list[Term]) -> list[Term]:
    """One term for each name and role, by size; why names the largest makers."""
    sums: dict[tuple[str, str, str], list[Term]] = {}
    for term in terms:
        sums.setdefault((term.name, term.role, term.place), []).append(term)
    found = []
    for (name, role, place), parts in sums.items():
        makers = ", ".join(f"{p.why} {p.bytes / 2**20:,.1f} MiB" for p in parts[:3])
        why = parts[0].why if len(parts) == 1 else makers
        found.append(Term(name, role, sum(p.bytes for p in parts), why, place))
    return found
