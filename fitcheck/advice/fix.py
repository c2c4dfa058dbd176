"""Fix: one change to a plan, or several together, and what becomes of the plan under it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fitcheck import catalog
from fitcheck.advice.commands import command, flags
from fitcheck.fit import fit
from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.plan import Plan
from fitcheck.report import Report


@dataclass(frozen=True, slots=True)
class Fix:
    """One change, or several together, judged on the whole plan.

    origin: the plan as it was. saves: bytes at the whole plan's peak. rank: of RANKS, the worst of
    its changes. effects: of each change, in words.
    """

    changes: Mapping[str, Any]
    origin: Plan
    plan: Plan
    rank: str
    effects: tuple[str, ...]
    saves: int
    peak_bytes: int
    verdict: str
    environment: str = ""  # a variable to set for the run: no plan holds it

    @classmethod
    def of(
        cls,
        before: Report,
        after: Report,
        changes: Mapping[str, Any],
        rank: str,
        effects: tuple[str, ...],
    ) -> Fix:
        """The fix that leads from one report to the other."""
        return cls(
            changes=changes,
            origin=before.plan,
            plan=after.plan,
            rank=rank,
            effects=effects,
            saves=before.peak_bytes - after.peak_bytes,
            peak_bytes=after.peak_bytes,
            verdict=after.verdict,
        )

    @property
    def time(self) -> float | None:
        """How many times as long a sample takes (a prompt, a pair, an example; of inference a

        token); None where the card's rates are unknown.
        """
        return slower(self.origin, self.plan)

    @property
    def effect(self) -> str:
        """What it does besides, in words."""
        return "; ".join(self.effects)

    @property
    def size(self) -> int:
        """How many changes it is."""
        return len(self.effects)

    @property
    def flags(self) -> str:
        """What changes: as flags, or the variable to set."""
        return self.environment or flags(self.changes)

    @property
    def command(self) -> str:
        """The command that checks the changed plan."""
        if self.environment:  # of the allocator: only its replay can tell
            return f"{self.environment} {command(self.plan, 'dryrun')}"
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
            "environment": self.environment,
            "command": self.command,
        }


def judged(plan: Plan, seconds: bool = True) -> Report:
    """The estimate, with the error that is on record for it."""
    return fit(plan, catalog.stated_error(plan.method, "estimate"), seconds)


EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def uncached(report: Report) -> list[Fix]:
    """Expandable segments and empty_cache, where what the allocator keeps cached is what is too

    much. They change what is reserved and hardly what is allocated: at best all of the cache is
    saved. How much of it is, a dry run can tell; hence never more than tight.
    """
    plan, cache = report.plan, report.peak_bytes - report.needed_bytes
    if report.card_verdict == "fits" or report.needed_bytes > report.usable_bytes or not cache:
        return []
    found: list[tuple[str, dict[str, Any], str]] = []
    if plan.gpu.vendor == "nvidia":
        found.append(("segments grow in place: less lies cached between blocks", {}, EXPANDABLE))
    if plan.empty_cache is False:
        effect = "the cache goes back to the driver between phases, and is asked for again"
        found.append((effect, {"empty_cache": True}, ""))
    return [
        Fix(
            changes=changes,
            origin=plan,
            plan=plan.change(**changes) if changes else plan,
            rank="result unchanged",
            effects=(effect,),
            saves=cache,
            peak_bytes=report.needed_bytes,
            verdict="tight",
            environment=variable,
        )
        for effect, changes, variable in found
    ]


def slower(before: Plan, after: Plan) -> float | None:
    """How many times as long a sample takes after a change; below 1: it is faster."""
    was, now = _pace(before), _pace(after)
    return now / was if was and now else None


@lru_cache(maxsize=1024)
def _pace(plan: Plan) -> float | None:
    return pace(judged(plan))


def pace(report: Report) -> float | None:
    """Seconds a sample: a step's over its batch; of inference, seconds a token while it decodes."""
    plan, speed = report.plan, report.speed
    if speed is None:
        return None
    if plan.method == "inference":
        return 1 / speed.tokens_per_second
    return speed.step_seconds / plan.batch
