"""fit(plan) -> Report: the estimate. Pure arithmetic, no files, no device, under a millisecond."""

from __future__ import annotations

from fitcheck.errors import FitCheckError
from fitcheck.phases import phases
from fitcheck.plan import Plan
from fitcheck.report import Ram, Report
from fitcheck.weights import has_closed_form


def fit(plan: Plan) -> Report:
    """What one step of the plan takes, phase by phase. FitCheckError where it is not modelled."""
    for model in (plan.model, plan.reward_architecture, plan.critic_architecture):
        if model is not None and not has_closed_form(model):
            raise FitCheckError(
                f"{model.id}: the estimate does not cover the architecture {model.model_type}",
                "choose a model of another architecture; `fitcheck models` marks those covered",
            )
    return Report(plan, phases(plan), Ram(0, plan.ram, "load"))
