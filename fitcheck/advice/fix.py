"""fixes(plan, report): the changes that lower the peak, those that make the plan fit first.

Singles, then combinations: of the changes of a rank and the ranks below it, each combination cut
down until nothing in it can be left out, and each size raised as far as it still fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fitcheck import catalog
from fitcheck.advice.changes import RANKS, Change, Level, changed, changes
from fitcheck.advice.commands import command, flags
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.plan import Plan
from fitcheck.report import Report

LEAST = 2**30 // 20  # a change that saves less, and is not enough, is not worth a line
VERDICTS = ("fits", "tight", "does-not-fit")


@dataclass(frozen=True, slots=True)
class Fix:
    """One change, or several together, judged on the whole plan.

    saves: bytes at the whole plan's peak. time: how many times as long a step takes, None when
    that is not known. rank: of RANKS, the worst of its changes.
    """

    changes: Mapping[str, Any]
    plan: Plan
    rank: str
    effect: str
    saves: int
    peak_bytes: int
    verdict: str
    time: float | None = None

    @property
    def flags(self) -> str:
        """What changes, as flags."""
        return flags(self.changes)

    @property
    def command(self) -> str:
        """The command that checks the changed plan."""
        return command(self.plan)

    def to_json(self) -> dict[str, Any]:
        """The object in a report's `advice`; models by their ids."""
        values = {
            name: value.id if isinstance(value, (Model, GPU)) else value
            for name, value in self.changes.items()
        }
        return {
            "changes": {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()},
            "rank": self.rank,
            "effect": self.effect,
            "saves_bytes": self.saves,
            "peak_bytes": self.peak_bytes,
            "verdict": self.verdict,
            "time": self.time,
            "command": self.command,
        }


def fixes(plan: Plan, report: Report, limit: int | None = None) -> list[Fix]:
    """The changes that lower the estimated peak, at most `limit`.

    First those after which the plan fits, of them the ones that cost the user least (by rank, then
    by how many changes they are); then those that only help. report: of this plan, on any rung.
    """
    search = Search(plan, report)
    singles = list(search.singles())
    stacks = list(search.stacks({fix.rank for fix in singles if fix.verdict == "fits"}))

    def order(fix: Fix) -> tuple[int, int]:
        return VERDICTS.index(fix.verdict), RANKS.index(fix.rank)

    return sorted([*singles, *stacks], key=order)[:limit]


@dataclass(frozen=True, slots=True)
class Pick:
    """A change at one of its levels."""

    change: Change
    at: int = -1

    @property
    def level(self) -> Level:
        return self.change.levels[self.at]

    @property
    def cost(self) -> int:
        return RANKS.index(self.change.rank)


def judged(plan: Plan) -> Report:
    """The estimate, with the error that is on record for it."""
    return fit(plan, catalog.stated_error(plan.method, "estimate"))


class Search:
    """The changes of one plan, and what becomes of it under them."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self.plan = plan
        self.before = report if report.source == "estimate" else judged(plan)
        self.picks = [Pick(change) for change in changes(plan)]
        self.orders = {id(pick.change): at for at, pick in enumerate(self.picks)}

    def report(self, picks: list[Pick]) -> Report | None:
        """The estimate of the changed plan; None where its changes contradict each other."""
        try:
            plan = changed(self.plan, [pick.level for pick in picks])
            return judged(plan)
        except FitCheckError:
            return None  # the rules, or the formulas, refuse this combination

    def fits(self, picks: list[Pick]) -> bool:
        report = self.report(picks)
        return report is not None and report.verdict == "fits"

    def fix(self, picks: list[Pick]) -> Fix | None:
        """What these changes do; None unless they lower the peak."""
        report = self.report(picks)
        if report is None or report.peak_bytes >= self.before.peak_bytes:
            return None
        together: Level = {}
        for pick in picks:
            together |= pick.level
        if "offload" in together:
            together["offload"] = report.plan.offload
        rank = RANKS[max(pick.cost for pick in picks)]
        effect = "; ".join(pick.change.effect for pick in picks)
        saves = self.before.peak_bytes - report.peak_bytes
        return Fix(together, report.plan, rank, effect, saves, report.peak_bytes, report.verdict)

    def singles(self) -> Iterator[Fix]:
        """Each change alone, in its mildest form that fits, or else in its strongest."""
        for pick in self.picks:
            if self.fits([pick]):
                pick = self.mildest(pick, [])
            fix = self.fix([pick])
            if fix and (fix.verdict == "fits" or fix.saves >= LEAST):
                yield fix

    def mildest(self, pick: Pick, others: list[Pick]) -> Pick:
        """The same change at its mildest level that fits together with the others."""
        low, high = -1, len(pick.change.levels) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.fits([*others, Pick(pick.change, middle)]):
                high = middle
            else:
                low = middle
        return Pick(pick.change, high)

    def stacks(self, alone: set[str]) -> Iterator[Fix]:
        """Combinations that fit: the cheapest rank whose changes do it together, or with one of
        the next rank; ranks where one change suffices (`alone`) need none."""
        below: list[Pick] = []
        for rank in RANKS[:2]:
            if rank in alone:
                return
            below += [pick for pick in self.picks if pick.change.rank == rank]
            below = self.compatible(below)
            if len(below) > 1 and self.fits(below):
                yield from self.cut(below, [])
                return
        yield from self.anchored(below)

    def anchored(self, below: list[Pick]) -> Iterator[Fix]:
        """Each change of method with what is cheaper beside it; several of them if need be."""
        anchors = [pick for pick in self.picks if pick.change.rank == RANKS[2]]
        found = False
        for anchor in anchors:
            picks = self.compatible([anchor, *below])
            if self.fits(picks):
                found = True
                if not self.fits([anchor]):
                    yield from self.cut(picks[1:], [anchor])
        if not found:
            yield from self.cut(self.compatible([*below, *anchors]), [])

    def compatible(self, picks: list[Pick]) -> list[Pick]:
        """Those that can go together, the earlier ones first; no two for the same field."""
        found: list[Pick] = []
        fields: set[str] = set()
        for pick in picks:
            new = pick.level.keys() - {"offload"}
            if not fields & new and self.report([*found, pick]) is not None:
                found.append(pick)
                fields |= new
        return found

    def cut(self, picks: list[Pick], kept: list[Pick]) -> Iterator[Fix]:
        """The combination without what it does not need, the costliest left out first."""
        if not self.fits([*kept, *picks]):
            return
        for pick in sorted(picks, key=lambda pick: -self.orders[id(pick.change)]):
            fewer = [other for other in picks if other is not pick]
            if self.fits([*kept, *fewer]):
                picks = fewer
        found = [*kept, *picks]
        for at, pick in enumerate(found):
            others = found[:at] + found[at + 1 :]
            found[at] = self.mildest(pick, others)
        if len(found) > 1 and (fix := self.fix(found)):
            yield fix
