"""The largest micro-batch that really fits, by trying: `fitcheck bench --until-oom`.

Each try is a process of its own on the real device. The search begins at what the estimate says;
when it is right, two tries are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fitcheck import worker
from fitcheck.advice.ceiling import boundary, halved, level
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.measured import Measurement
from fitcheck.plan import Plan
from fitcheck.rules import LARGEST


@dataclass(slots=True)
class Search:
    """What was tried, by micro-batch; the largest that fitted, and what was predicted."""

    plan: Plan
    estimated: int  # the largest that the estimate lets in
    tried: dict[int, Measurement] = field(default_factory=dict)
    largest: int = 0
    traced: dict[int, str] = field(default_factory=dict)  # the dry run's verdict at the edge

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        return {
            "plan": self.plan.to_json(),
            "largest_micro_batch": self.largest,
            "estimated_micro_batch": self.estimated,
            "dry_run": {str(size): verdict for size, verdict in self.traced.items()},
            "tried": {str(size): self.tried[size].to_json() for size in sorted(self.tried)},
        }


def until_oom(
    plan: Plan,
    options: list[str],
    environment: Mapping[str, str],
    watch: Callable[[int, Measurement], None],
) -> Search:
    """Search from the estimate's answer up or down; watch: told of each try."""
    found = Search(plan, _estimated(plan))

    def fits(size: int) -> bool:
        tried = worker.measure(_at(plan, size), options, environment=environment)
        if tried.stopped:
            raise FitCheckError("stopped", f"tried so far: {', '.join(map(str, found.tried))}")
        found.tried[size] = tried
        watch(size, tried)
        return tried.oom is None

    found.largest = searched(fits, max(1, found.estimated))
    for size in filter(None, (found.largest, found.largest + 1)):
        report = worker.dry_run(_at(plan, size), environment=environment)
        found.traced[size] = report.card_verdict
    return found


def searched(fits: Callable[[int], bool], start: int) -> int:
    """A number that fits and whose successor does not, asked near `start` first; 0: not even 1.

    Steps away from `start` double until the other side is met, then their interval is halved.
    """
    step = 1
    if fits(start):
        low, high = start, start + step
        while fits(high):
            low, step = high, 2 * step
            high = low + step
    else:
        low, high = start - step, start
        while low > 0 and not fits(low):
            high, step = low, 2 * step
            low = max(0, high - step)
    return halved(fits, low, high)


def _at(plan: Plan, size: int) -> Plan:
    return plan.change(**level(plan, "micro_batch", size))


def _estimated(plan: Plan) -> int:
    def fits(size: int) -> bool:
        try:
            return fit(_at(plan, size)).card_verdict != "does-not-fit"
        except FitCheckError:  # the rules of a plan end the search, too
            return False

    return boundary(fits, plan.micro_batch, LARGEST)
