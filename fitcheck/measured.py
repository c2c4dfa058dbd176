"""The types of a measurement: what each phase took on a real device, and what was run.

    measurement.report.allocated_bytes      # as of every other rung
    measurement.readings[3].seconds         # of one step, in that phase
    measurement.oom                         # where memory ran out, if it did

These are made in a process of their own, where torch is, and read here from its JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fitcheck.plan import Plan
from fitcheck.report import Report


class Reading(NamedTuple):
    """One phase over the measured steps: bytes at most, seconds of one step. None: nobody says."""

    phase: str
    seconds: float
    allocated_bytes: int  # when it ended
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    used_bytes: int | None = None  # of the whole card, by NVML or its like
    outside_bytes: int | None = None  # of these, the process's own outside of the allocator
    tokens_per_second: float | None = None
    mfu: float | None = None  # of an update as a whole: its model FLOP/s, as a share of the card's
    bandwidth: float | None = None  # of decoding: bytes that must be read, as a share of the card's


class Oom(NamedTuple):
    """Where memory ran out; step 0 is loading. Bytes; free: what could still have been had."""

    phase: str
    step: int
    operator: str
    requested_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """What was run: device (cuda, xpu, mps, cpu), its name, versions by package, how many steps."""

    device: str
    card: str
    versions: Mapping[str, str]
    date: str
    warmup: int
    steps: int  # measured, of those that were asked for
    asked: int
    retries: int  # how often the allocator gave back its cache to go on
    seconds: float  # of one step
    expandable: bool = False
    limit_bytes: int | None = None
    weights: str = "random"

    @property
    def on_card(self) -> bool:
        """Whether an allocator's own counters were read: what only that proves, is proven."""
        return self.device in ("cuda", "xpu")


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measured Report with what only a measurement has."""

    report: Report
    run: Run
    readings: tuple[Reading, ...]
    oom: Oom | None = None

    @property
    def stopped(self) -> bool:
        """Whether somebody ended it before all was measured."""
        return self.oom is None and self.run.steps < self.run.asked

    def to_json(self) -> dict[str, Any]:
        """A Report's object, with `measurement` beside its keys."""
        run = {name: getattr(self.run, name) for name in self.run.__slots__}
        more = {
            "run": run | {"versions": dict(self.run.versions)},
            "readings": [reading._asdict() for reading in self.readings],
            "oom": self.oom and self.oom._asdict(),
        }
        return self.report.to_json() | {"measurement": more}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], plan: Plan) -> Measurement:
        """What `to_json` wrote of this plan."""
        more = values["measurement"]
        return cls(
            Report.from_json(values, plan),
            Run(**more["run"]),
            tuple(Reading(**reading) for reading in more["readings"]),
            Oom(**more["oom"]) if more["oom"] else None,
        )

    def noting(self, *notes: str) -> Measurement:
        """With more notes."""
        return replace(self, report=replace(self.report, notes=(*self.report.notes, *notes)))
