"""ceilings(plan): how far each axis goes before the plan no longer fits, by search on the estimate.

    ceilings(plan)["response"]        # Ceiling(field="response", now=512, value=1376, step=1, ...)

A value is exact: the plan fits with it and does not with the next one (value + step).
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any, NamedTuple

from fitcheck.advice.changes import Level, family_of
from fitcheck.advice.fix import judged
from fitcheck.errors import FitCheckError
from fitcheck.plan import ROLLOUT, Plan
from fitcheck.rules import LARGEST


class Ceiling(NamedTuple):
    """The largest value of one field with which the plan fits; None where not even the least does.

    bound: what stops it: "memory", or "rules" (such as the longest text that the model can read).
    """

    field: str
    now: Any
    value: Any
    step: int
    bound: str
    plan: Plan | None


def ceilings(plan: Plan) -> dict[str, Ceiling]:
    """The ceiling of each axis that the plan has, all else as it is."""
    found = {}
    for field, step in _axes(plan):
        found[field] = _ceiling(plan, field, step)
    if largest := _largest_model(plan):
        found["model"] = largest
    return found


def _axes(plan: Plan) -> list[tuple[str, int]]:
    """The fields to search, and the step that keeps sizes divisible."""
    if plan.method == "inference":
        return [("context", 1), ("concurrency", 1)]
    axes = [("prompt", 1), ("response", 1)] if plan.method in ROLLOUT else [("sequence", 1)]
    if plan.method in ROLLOUT:
        sizes = [plan.micro_batch * plan.gpus, plan.score_batch * plan.gpus, plan.group or 1]
        if "minibatch" in plan.given:
            sizes.append(plan.minibatch)
        axes.append(("batch", lcm(*sizes)))
    axes.append(("micro_batch", 1))
    if plan.lora_rank:
        axes.append(("lora_rank", 1))
    return axes


def level(plan: Plan, field: str, value: int) -> Level:
    """What to change for the field to have the value: a micro-batch takes its batch along."""
    if field != "micro_batch":
        return {field: value}
    found: Level = {"micro_batch": value, "batch": value * (plan.batch // plan.micro_batch)}
    if "minibatch" in plan.given:
        found["minibatch"] = value * (plan.minibatch // plan.micro_batch)
    if "score_batch" in plan.given and plan.score_batch:
        found["score_batch"] = min(plan.score_batch, value) if plan.method != "dpo" else value
    return found


def _ceiling(plan: Plan, field: str, step: int) -> Ceiling:
    def fits(number: int) -> bool:
        return _fits(plan, level(plan, field, number * step))

    now = getattr(plan, field)
    best = boundary(fits, max(1, now // step), LARGEST // step)
    if best == 0:
        return Ceiling(field, now, None, step, "memory", None)
    refused = _changed(plan, level(plan, field, (best + 1) * step)) is None
    at = _changed(plan, level(plan, field, best * step))
    return Ceiling(field, now, best * step, step, "rules" if refused else "memory", at)


def boundary(fits: Callable[[int], bool], start: int, most: int) -> int:
    """A number that fits, whose successor does not (or is beyond `most`); 0 if 1 does not fit."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    return halved(fits, low, min(high, most + 1))


def halved(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The last number that fits, between one that fits and one that does not."""
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _changed(plan: Plan, change: Level) -> Plan | None:
    """The changed plan; None where the rules of a plan refuse it."""
    try:
        return plan.change(**change)
    except FitCheckError:
        return None


def _fits(plan: Plan, change: Level) -> bool:
    try:
        return judged(plan.change(**change), False).verdict == "fits"
    except FitCheckError:  # the rules refuse it, or an engine's share is too small for it
        return False


def _largest_model(plan: Plan) -> Ceiling | None:
    """The largest model of the policy's family with which the plan fits."""
    family = family_of(plan.model)
    for model in family:
        if _fits(plan, {"model": model}):
            bound = "rules" if model is family[0] else "memory"
            return Ceiling("model", plan.model, model, 0, bound, plan.change(model=model))
    return Ceiling("model", plan.model, None, 0, "memory", None) if family else None
