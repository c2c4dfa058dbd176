"""The three rungs of one plan on this machine: estimate, dry run, measurement."""

from __future__ import annotations

from typing import NamedTuple

from fitcheck import worker
from fitcheck.advice.fix import judged
from fitcheck.decoder import covered
from fitcheck.here import Here
from fitcheck.measured import Measurement
from fitcheck.plan import Plan
from fitcheck.progress import Bar
from fitcheck.report import Report


class Three(NamedTuple):
    """What each rung says; no estimate where it does not cover the model."""

    estimate: Report | None
    traced: Report
    measured: Measurement


def three(here: Here, options: list[str], steps: int) -> Three:
    """Predict a plan's step twice, then measure it, with a bar for whoever watches."""
    plan, environment = here
    estimate = estimated(plan)
    names = [phase.name for phase in estimate.phases] if estimate else []
    with Bar(names) as bar:
        traced = worker.dry_run(plan, (), bar, environment)
    with Bar([phase.name for phase in traced.phases], "measuring", steps + 1) as bar:
        measured = worker.measure(plan, options, bar, environment)
    return Three(estimate, traced, measured)


def estimated(plan: Plan) -> Report | None:
    """The estimate; None where it does not cover a model of the plan."""
    models = (plan.model, plan.reward_architecture, plan.critic_architecture)
    if any(covered(model, plan.tuning or "") for model in models if model is not None):
        return None
    return judged(plan)
