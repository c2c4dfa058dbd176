"""Advice checked by the dry run: the plan as it is, then each change that is said to make it fit.

    for check in verified(report, fixes(report.plan, report)):
        print(check.fix and check.fix.flags, check.report.verdict)

A dry run takes seconds, hence one at a time, as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from fitcheck import worker
from fitcheck.advice import Fix, uncached
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.progress import Bar
from fitcheck.report import Report

CLOSE = 0.1  # of the usable memory: with less to spare a plan that fits is worth a dry run
FEW = 3  # changes to check where the estimate says that none is needed
STOPPED = "stopped"  # what worker.py says after ctrl-C


class Check(NamedTuple):
    """A dry run of one change, of the plan itself where fix is None; said: why it has no report."""

    fix: Fix | None
    report: Report | None
    said: str = ""

    def to_json(self) -> dict[str, Any]:
        if self.report is None:
            return {"error": self.said}
        names = ("verdict", "peak_bytes", "allocated_bytes", "reserved_bytes")
        return {name: getattr(self.report, name) for name in names}


def possible() -> bool:
    """Whether torch and its libraries are here."""
    return all(find_spec(name) is not None for name in worker.NEEDED)


def verified(report: Report, found: Sequence[Fix]) -> Iterator[Check]:
    """The dry runs, until ctrl-C; none of a plan that fits with room to spare.

    Where the plan's own dry run fails by the allocator's cache alone, what lessens that follows.
    """
    fits = report.verdict == "fits"
    if fits and report.spare_bytes > CLOSE * report.usable_bytes:
        return
    own = _check(report, None, report.plan)
    if own.said == STOPPED:
        return
    yield own
    fixes = [fix for fix in found if fix.verdict != "does-not-fit"]
    if fits:  # by the estimate, which knows no fragments
        fixes = fixes[:FEW] if own.report and own.report.verdict != "fits" else []
    if own.report:
        known = {fix.flags for fix in fixes}
        fixes = [fix for fix in uncached(own.report) if fix.flags not in known] + fixes
    for fix in fixes:
        check = _check(report, fix, fix.plan)
        if check.said == STOPPED:
            return
        yield check


def _check(report: Report, fix: Fix | None, plan: Plan) -> Check:
    variable, _, value = fix.environment.partition("=") if fix else ("", "", "")
    environment = {variable: value} if variable else {}
    try:
        with Bar([phase.name for phase in report.phases]) as bar:
            return Check(fix, worker.dry_run(plan, (), bar, environment))
    except FitCheckError as fault:  # not every plan can be built or traced
        return Check(fix, None, fault.message)
