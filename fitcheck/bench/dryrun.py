"""The dry run: a plan's real step on `meta` tensors, replayed through the allocator -> Report.

    report = dry_run(plan)  # seconds, no GPU; needs torch and transformers
    report.allocated_bytes  # what torch.cuda.max_memory_allocated() would say

A phase's figures are those of the second step, when optimizer states exist; the first one has left
its traces in the allocator by then.
"""

from __future__ import annotations

from fitcheck import kernels
from fitcheck.bench.allocator import Allocator, Replay, replay
from fitcheck.bench.trace import NOWHERE, Holder, Trace, trace
from fitcheck.host import ram
from fitcheck.plan import Plan
from fitcheck.report import CACHED, OUTSIDE, Moment, Phase, Report, Term

STEPS = 2


def dry_run(plan: Plan) -> Report:
    """Trace and replay the plan's step. Raises FitCheckError for a model that cannot be built."""
    traced = trace(plan, STEPS)
    whole = replay(traced.events, Allocator(), traced.marks)
    limit = plan.memory.usable_bytes - kernels.CONTEXT
    outcome, notes = "fits", []
    if whole.peak_reserved > limit:
        under = replay(traced.events, Allocator(limit_bytes=max(0, limit)), traced.marks)
        if under.oom is not None:
            outcome, notes = "does-not-fit", [_failure(plan, traced, under.oom)]
        else:
            outcome = "tight" if under.retries else "fits"
            whole = under
    phases = _phases(plan, traced, whole)
    return Report(plan, phases, ram(plan), source="dry-run", notes=tuple(notes), outcome=outcome)


def _failure(plan: Plan, traced: Trace, index: int) -> str:
    """Where memory runs out: the phase, the operator, and the module of a second, detailed trace."""
    phase = next(name for begin, end, _, name in traced.phases() if begin <= index < end)
    size, name = traced.events[index]
    maker = trace(plan, STEPS, detail=True).maker(name)
    return f"out of memory in {phase}: {maker} asks for {size:,} bytes"


def _phases(plan: Plan, traced: Trace, replayed: Replay) -> tuple[Phase, ...]:
    """Each phase at its largest moment."""
    largest: dict[str, tuple[int, int]] = {}
    for (index, name), peak in zip(traced.marks, replayed.marks, strict=False):
        if name == "load" or index >= traced.starts[-1]:
            known = largest.get(name, (0, 0))
            largest[name] = max(known[0], peak.allocated), max(known[1], peak.reserved)
    largest.pop(NOWHERE, None)
    last = len(traced.starts) - 1
    at = {name: i for (step, name), i in traced.peaks().items() if step == last or name == "load"}
    order = sorted(largest.keys() & at.keys(), key=at.__getitem__)
    held = dict(zip(order, traced.held([at[name] for name in order]), strict=True))
    return tuple(
        Phase(name, (Moment(name, _terms(held[name], *largest[name])),))
        for name in largest
        if name in held
    )


def _terms(held: dict[Holder, int], allocated: int, reserved: int) -> tuple[Term, ...]:
    """What is held, by role and kind; then what the allocator and the context add."""
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for holder, size in held.items():
        group = groups.setdefault(_name(holder), {})
        group[holder.what] = group.get(holder.what, 0) + size
    terms = [
        Term(name, role, sum(makers.values()), _why(makers))
        for (role, name), makers in groups.items()
    ]
    terms.sort(key=lambda term: -term.bytes)
    rest = allocated - sum(term.bytes for term in terms)
    return (
        *terms,
        Term("allocator rounding", "card", rest, "rests of blocks too small to split off"),
        Term("cached", "card", reserved - allocated, "reserved, not in use", CACHED),
        Term("CUDA context", "card", kernels.CONTEXT, "context and kernels: an estimate", OUTSIDE),
    )


def _why(makers: dict[str, int]) -> str:
    """The operators that made most of it."""
    most = sorted(makers, key=makers.__getitem__, reverse=True)[:3]
    named = [f"{maker} {makers[maker]:,} B" for maker in most if maker]
    return "traced" + (": " + ", ".join(named) if named else "")


def _name(holder: Holder) -> tuple[str, str]:
    """(role, name of a Term). What does not last is called after the phase that made it."""
    if holder.role:
        kind = "weights" if holder.kind == "buffers" else holder.kind
        return holder.role, kind
    if holder.what == "cublas":
        return "card", "cuBLAS workspace"
    parts = holder.kind.split(".")
    role = parts[1] if parts[0] == "score" or len(parts) == 3 else "policy"
    if parts[0] == "rollout":
        return role, "KV cache" if holder.what == "aten.cat.default" else "working tensors"
    kinds = {"forward": "activations", "loss": "logits and loss", "backward": "working tensors"}
    if parts[-1] in kinds:
        return role, kinds[parts[-1]]
    if parts[0] in ("update", "score"):
        return role, "optimizer temporary" if parts[-1] == "step" else "working tensors"
    return "batch", "tokens and scores"
