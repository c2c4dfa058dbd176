"""frontier(plan): the choices that leave the result unchanged, memory against time.

Of all their combinations only those that no other beats in both: less memory is more time.
"""

from __future__ import annotations

from itertools import product

from fitcheck.advice.changes import Level, changed, divisors
from fitcheck.advice.fix import Fix, judged
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.report import Report

SIZES = 8  # of micro-batches that are tried, the smallest ones
NEXT = 0.99  # a step of the frontier is at least 1 % faster than the one before


def frontier(plan: Plan) -> list[Fix]:
    """From the least memory to the least time; empty where the card's rates are unknown.

    saves and time are against the plan as it is, which may lie anywhere beside the frontier.
    """
    before = judged(plan, False)
    found = []
    for levels in product(*_axes(plan)):
        fix = _changed(before, [level for level in levels if level])
        if fix is not None and fix.time is not None:
            found.append(fix)
    found.sort(key=lambda fix: (fix.peak_bytes, fix.time, len(fix.changes)))
    front: list[Fix] = []
    for fix in found:
        if not front or (fix.time or 0.0) < NEXT * (front[-1].time or 0.0):
            front.append(fix)
    return front


def _changed(before: Report, levels: list[Level]) -> Fix | None:
    together: Level = {}
    for level in levels:
        together |= level
    try:
        after = judged(changed(before.plan, levels), False)
    except FitCheckError:
        return None  # the rules, or the formulas, refuse it
    return Fix.of(before, after, together, "result unchanged", ())


def _axes(plan: Plan) -> list[list[Level]]:
    """Each choice that leaves the result as it is; the empty level keeps what the plan has."""
    if plan.method == "inference":
        return []
    whole = plan.on_card(plan.minibatch or plan.batch)
    sizes = (whole, *divisors(whole))[-SIZES:]
    axes: list[list[Level]] = [
        [{}, {"checkpointing": not plan.checkpointing}],
        [{}, *({"micro_batch": n} for n in sizes if n != plan.micro_batch)],
        [{}, *({"loss": loss} for loss in ("full", "chunked", "fused") if loss != plan.loss)],
    ]
    if plan.gpus > 1:
        ways = ("ddp", "zero2", "fsdp")  # what lies between differs little
        axes.append([{}, *({"sharding": way} for way in ways if way != plan.sharding)])
    if plan.optimizer == "adamw":
        axes.append([{}, {"optimizer": "adamw-fused"}])
    parts = {
        "reference": plan.reference == "copy",
        "reward": plan.reward_architecture is not None,
        "critic": plan.critic_architecture is not None,
    }
    roles = tuple(part for part, own in parts.items() if own)
    offloads: list[tuple[str, ...]] = [(), roles, (*roles, "optimizer")]
    axes.append([{}, *({"offload": away} for away in offloads if away != plan.offload)])
    return axes
