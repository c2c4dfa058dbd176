"""Which models fit one card under one plan: `fitcheck models --fits`.

    found = fitting(catalog.models(), gpu="4090", method="ppo", tuning="lora")
    [report.plan.model.id for report in found.reports]      # the largest first

What does not fit, and what cannot be asked, is counted, never dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from fitcheck import catalog
from fitcheck.answer import resolve_fields
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.model import Model
from fitcheck.plan import Plan
from fitcheck.report import Report


class Fitting(NamedTuple):
    """What became of each model that was asked about."""

    reports: tuple[Report, ...]  # of those that fit, barely or well; the largest model first
    too_large: int
    too_short: int  # the plan has more tokens than they can read
    not_covered: int  # by the estimate
    refused: tuple[FitCheckError, ...]  # the plan makes no sense for them
    card: str  # what to say of a card that was not asked for by its full name


def fitting(models: Iterable[Model], **wishes: Any) -> Fitting:
    """The models that fit. wishes: as for `fitcheck.check`.

    Raises FitCheckError for unknown names, and for a plan that makes no sense for any model.
    """
    fields, card = resolve_fields(wishes)
    reports: list[Report] = []
    too_large = too_short = not_covered = 0
    refused: list[FitCheckError] = []
    for model in models:
        if covered(model, fields.get("tuning", "full")):
            not_covered += 1
            continue
        try:
            plan = Plan(model=model, **fields)
            report = fit(plan, catalog.stated_error(plan.method, "estimate"))
        except FitCheckError as fault:
            if _is_short(model, fields):
                too_short += 1
            else:
                refused.append(fault)
            continue
        if report.verdict == "does-not-fit":
            too_large += 1
        else:
            reports.append(report)
    if refused and not (reports or too_large or too_short):
        raise refused[0]
    reports.sort(key=lambda report: -report.plan.model.params)
    return Fitting(tuple(reports), too_large, too_short, not_covered, tuple(refused), card)


def _is_short(model: Model, fields: dict[str, Any]) -> bool:
    """Whether the plan's tokens are all that is wrong."""
    longest = model.max_position_embeddings
    try:
        plan = Plan(model=replace(model, max_position_embeddings=sys.maxsize), **fields)
    except FitCheckError:
        return False
    return longest is not None and plan.tokens > longest
