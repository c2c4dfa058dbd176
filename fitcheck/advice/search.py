"""fixes(plan, report): the changes that lower the peak, those that make the plan fit first.

Singles, then combinations: all changes of a rank and of the ranks below it, cut down until nothing
in the combination can be left out, each size raised as far as it still fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fitcheck.advice.changes import RANKS, Change, Level, changed, changes
from fitcheck.advice.fix import Fix, judged, uncached
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.report import Report

LEAST = 2**30 // 20  # a change that saves less, and is not enough, is not worth a line
VERDICTS = ("fits", "tight", "does-not-fit")


def fixes(plan: Plan, report: Report, limit: int | None = None) -> list[Fix]:
    """The changes that lower the estimated peak, at most `limit`.

    First those after which the plan fits, of them the ones that cost the user least (by rank, then
    by how many changes they are, then by time); then those that only help. report: of this plan,
    on any rung.
    """
    return _found(plan, report, limit)[:limit]


def best(plan: Plan, report: Report, limit: int) -> list[Fix]:
    """What makes the plan fit, the cheapest first; where nothing does, what saves most."""
    found = _found(plan, report, limit)
    enough = [fix for fix in found if fix.verdict != "does-not-fit"]
    return (enough or sorted(found, key=lambda fix: -fix.saves))[:limit]


def _found(plan: Plan, report: Report, limit: int | None) -> list[Fix]:
    """All changes in order; with a limit no more are sought when nothing better can follow."""

    def cost(fix: Fix) -> tuple[int, int, int, float]:
        rank = RANKS.index(fix.rank)  # of methods, changes() knows best which is the smaller step
        timed = fix.rank != RANKS[-1] and fix.verdict != "does-not-fit"
        time = round(fix.time or 1.0, 1) if timed else 0.0
        return VERDICTS.index(fix.verdict), rank, fix.size, time

    found, fitting = uncached(report), 0
    for fix in Search(plan, report).found():
        found.append(fix)
        fitting += fix.verdict == "fits"
        if limit and fitting >= limit and fix.rank == RANKS[-1] and fix.size == 1:
            break
    return sorted(found, key=cost)


class Pick(NamedTuple):
    """A change at one of its levels, by default the strongest."""

    change: Change
    at: int = -1

    @property
    def level(self) -> Level:
        return self.change.levels[self.at]


class Search:
    """The changes of one plan, and what becomes of it under them."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self.plan = plan
        self.before = report if report.source == "estimate" else judged(plan)
        self.picks = [Pick(change) for change in changes(plan)]
        self.seen: dict[frozenset[tuple[int, int]], Report | None] = {}

    def found(self) -> Iterator[Fix]:
        """Rank by rank: each change alone, then combinations while no cheaper rank suffices."""
        cheaper: list[Pick] = []
        enough = False
        for rank in RANKS:
            own = [pick for pick in self.picks if pick.change.rank == rank]
            suffices = False
            for pick in own:
                if fix := self.single(pick):
                    yield fix
                    suffices = suffices or fix.verdict == "fits"
            if not enough:
                for fix in self.combinations(rank, own, cheaper):
                    yield fix
                    suffices = suffices or fix.verdict == "fits"
            enough = enough or suffices
            cheaper = self.compatible([*cheaper, *own])

    def single(self, pick: Pick) -> Fix | None:
        """The change alone, in its mildest form that fits, or else in its strongest."""
        if self.fits([pick]):
            pick = self.mildest(pick, [])
        fix = self.fix([pick])
        enough = fix is not None and fix.verdict == "fits" != self.before.verdict
        return fix if fix and (enough or fix.saves >= LEAST) else None

    def combinations(self, rank: str, own: list[Pick], cheaper: list[Pick]) -> Iterator[Fix]:
        """What fits together: of the cheap ranks as little as possible; around each change of
        method what it needs beside it, and of them several where one is not enough."""
        if rank != RANKS[-1]:
            yield from self.cut([], self.compatible([*cheaper, *own]))
            return
        enough = False
        for anchor in own:
            others = self.compatible([anchor, *cheaper])[1:]
            if self.fits([anchor]) or not self.fits([anchor, *others]):
                continue
            enough = True
            here = [pick for pick in others if "offload" not in pick.level]  # all on the card
            yield from self.cut([anchor], here if self.fits([anchor, *here]) else others)
        if not enough:
            yield from self.cut([], self.compatible([*cheaper, *own]))

    def compatible(self, picks: list[Pick]) -> list[Pick]:
        """Those that can go together, the earlier ones first; no two for the same field."""
        single: list[Pick] = []
        fields: set[str] = set()
        for pick in picks:
            new = pick.level.keys() - {"offload"}
            if not fields & new:
                single.append(pick)
                fields |= new
        if self.allowed(single):
            return single
        found: list[Pick] = []
        for pick in single:
            if self.allowed([*found, pick]):
                found.append(pick)
        return found

    def cut(self, kept: list[Pick], picks: list[Pick]) -> Iterator[Fix]:
        """What fits with these picks, less what it does not need, the costliest left out first."""
        if len(kept) + len(picks) < 2 or not self.fits([*kept, *picks]):
            return
        for pick in reversed(picks):
            fewer = [other for other in picks if other is not pick]
            if self.fits([*kept, *fewer]):
                picks = fewer
        found = [*kept, *picks]
        for at, pick in enumerate(found):
            found[at] = self.mildest(pick, found[:at] + found[at + 1 :])
        if len(found) > 1 and (fix := self.fix(found)):
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
        rank = max((pick.change.rank for pick in picks), key=RANKS.index)
        effects = tuple(pick.change.effect for pick in picks)
        return Fix.of(self.before, report, together, rank, effects)

    def fits(self, picks: list[Pick]) -> bool:
        report = self.report(picks)
        return report is not None and report.verdict == "fits"

    def report(self, picks: list[Pick]) -> Report | None:
        """The estimate of the changed plan; None where its changes contradict each other."""
        key = frozenset((id(pick.change), pick.at % len(pick.change.levels)) for pick in picks)
        if key not in self.seen:
            try:
                self.seen[key] = judged(changed(self.plan, [pick.level for pick in picks]), False)
            except FitCheckError:  # the rules, or the formulas, refuse this combination
                self.seen[key] = None
        return self.seen[key]

    def allowed(self, picks: list[Pick]) -> bool:
        """Whether the rules of a plan allow these changes together."""
        try:
            changed(self.plan, [pick.level for pick in picks])
        except FitCheckError:
            return False
        return True
