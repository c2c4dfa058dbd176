"""What a screen shows: one plan and its report. Every drawing is a function of a View.

view = judged(plan)                 # FitCheckError where the plan cannot be judged
view.report.verdict, prices(view.plan)["tuning"]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.tui.knobs import fields_of, notch

# Where the card of a plan is from.
DETECTING, DETECTED, PRETENDED = "detecting", "detected", "pretended"


@dataclass(frozen=True, slots=True)
class View:
    """A plan, its answer, and whether its card is this machine's."""

    plan: Plan
    report: Report
    card: str = PRETENDED


def answer(plan: Plan) -> Report:
    """The estimate, with the error that recorded measurements state."""
    return fit(plan, catalog.stated_error(plan.method, "estimate"))


estimated = lru_cache(maxsize=256)(answer)  # a key's plan and its neighbours, the way back


def judged(plan: Plan, card: str = PRETENDED) -> View:
    """The plan with its answer; FitCheckError for what the estimate does not cover."""
    return View(plan, estimated(plan), card)


def answered(plan: Plan | None) -> Report | None:
    """The estimate; None where there is no plan, or none that can be judged."""
    try:
        return estimated(plan) if plan is not None else None
    except FitCheckError:
        return None


@lru_cache(maxsize=64)
def prices(plan: Plan) -> dict[str, tuple[int | None, int | None]]:
    """Bytes that each knob saves (below 0) or costs one notch to the left and to the right.

    None where there is no notch, or the changed plan makes no sense. What changes the card itself
    has no price in bytes.
    """
    here = estimated(plan).peak_bytes
    found: dict[str, tuple[int | None, int | None]] = {}
    for name in fields_of(plan):
        if name in ("gpu", "ram"):
            found[name] = (None, None)
            continue
        sides = [answered(notch(plan, name, step)) for step in (-1, 1)]
        left, right = (side.peak_bytes - here if side else None for side in sides)
        found[name] = (left, right)
    return found
