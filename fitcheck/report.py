"""The types of an answer: Term, Moment, Phase, Report. All three rungs of truth return a Report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fitcheck.plan import Plan

ALLOCATED, CACHED, OUTSIDE = "allocated", "cached", "outside"


class Term(NamedTuple):
    """Bytes of one thing: whose it is, and how they were computed (`why`, written when asked for).

    place: allocated (torch.cuda.memory_allocated counts it), cached (only memory_reserved does), or
    outside (the CUDA context, paged states, an inference engine's share).
    """

    name: str
    role: str
    bytes: int
    reason: str | Callable[[], str]
    place: str = ALLOCATED

    @property
    def why(self) -> str:
        return self.reason if isinstance(self.reason, str) else self.reason()


class Moment(NamedTuple):
    """The terms alive together at one point of a phase."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        return sum([term.bytes for term in self.terms])

    def part(self, *places: str) -> int:
        """Bytes in some of the places: `part("allocated")`."""
        return sum([term.bytes for term in self.terms if term.place in places])


class Phase(NamedTuple):
    """A stage of a step; its terms are those of its largest moment, since peaks do not add."""

    name: str
    moments: tuple[Moment, ...]
    seconds: float | None = None

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def bytes(self) -> int:
        """Of the largest moment."""
        return max([moment.bytes for moment in self.moments])

    @property
    def terms(self) -> tuple[Term, ...]:
        return self.peak.terms


class Ram(NamedTuple):
    """What the host needs; usable_bytes and verdict are None for a pretended card without --ram."""

    peak_bytes: int
    usable_bytes: int | None
    phase: str
    terms: tuple[Term, ...] = ()

    @property
    def verdict(self) -> str | None:
        if self.usable_bytes is None:
            return None
        return "fits" if self.peak_bytes <= self.usable_bytes else "does-not-fit"


class Error(NamedTuple):
    """How far off answers of this rung were, by recorded measurements: |predicted/measured - 1|."""

    relative: float
    percentile: int
    n: int
    basis: str


class Speed(NamedTuple):
    """How fast a step is. Of inference, tokens a second while it decodes; else over whole steps.

    errors: how far off the seconds may be, by what they stand on (an engine, training); none of
    seconds that were measured.
    """

    step_seconds: float
    tokens_per_second: float
    source: str = "estimate"  # or measured
    errors: tuple[tuple[str, Error], ...] = ()
    basis: str = ""  # by what, and when, it was measured

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Speed:
        errors = tuple((name, Error(**error)) for name, error in values["errors"].items())
        return cls(**{**values, "errors": errors})

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"errors": {name: e._asdict() for name, e in self.errors}}


@dataclass(frozen=True, slots=True)
class Report:
    """One answer. source: estimate, dry-run or measured; notes: what the reader must know."""

    plan: Plan
    phases: tuple[Phase, ...]
    ram: Ram
    source: str = "estimate"
    error: Error | None = None
    notes: tuple[str, ...] = ()
    advice: tuple[Any, ...] = ()  # of fitcheck.advice.Fix: what makes it fit; none when it fits
    outcome: str | None = None  # of a replay under the limit; an estimate derives its own
    speed: Speed | None = None  # None: the card's rates are unknown

    @property
    def peak_phase(self) -> Phase:
        """Where most is needed; what the allocator only keeps cached is there in every phase."""
        return max(self.phases, key=lambda phase: phase.peak.part(ALLOCATED, OUTSIDE))

    @property
    def allocated_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated() would say over the whole step."""
        return max(m.part(ALLOCATED) for phase in self.phases for m in phase.moments)

    @property
    def reserved_bytes(self) -> int:
        """What torch.cuda.max_memory_reserved() would say."""
        return max(m.part(ALLOCATED, CACHED) for phase in self.phases for m in phase.moments)

    @property
    def peak_bytes(self) -> int:
        """Everything the card must hold at the worst moment."""
        return max([phase.bytes for phase in self.phases])

    @property
    def needed_bytes(self) -> int:
        """What cannot be given back: allocated and outside, without the allocator's cache."""
        return max(m.part(ALLOCATED, OUTSIDE) for phase in self.phases for m in phase.moments)

    @property
    def usable_bytes(self) -> int:
        return self.plan.memory.usable_bytes

    @property
    def spare_bytes(self) -> int:
        """Room left at the worst moment; negative when it does not fit."""
        return self.usable_bytes - self.peak_bytes

    @property
    def card_verdict(self) -> str:
        """fits, tight (only with cache flushes, or within the error), does-not-fit."""
        if self.outcome is not None:
            return self.outcome
        if self.needed_bytes > self.usable_bytes:
            return "does-not-fit"
        margin = self.error.relative if self.error else 0.0
        return "fits" if self.peak_bytes * (1 + margin) <= self.usable_bytes else "tight"

    @property
    def verdict(self) -> str:
        """The worse of the card's and the host's."""
        return "does-not-fit" if self.ram.verdict == "does-not-fit" else self.card_verdict

    @classmethod
    def from_json(cls, values: Mapping[str, Any], plan: Plan) -> Report:
        """The report that `to_json` wrote of this plan: each phase at its largest moment."""
        phases = []
        for phase in values["phases"]:
            terms = tuple(
                Term(t["name"], t["role"], t["bytes"], t["why"], t["place"]) for t in phase["terms"]
            )
            phases.append(Phase(phase["name"], (Moment(phase["moment"], terms),), phase["seconds"]))
        ram, error = values["ram"], values["error"]
        return cls(
            plan,
            tuple(phases),
            Ram(ram["peak_bytes"], ram["usable_bytes"], ram["phase"]),
            source=values["source"],
            error=Error(**error) if error else None,
            notes=tuple(values["notes"]),
            outcome=values["outcome"],
            speed=Speed.from_json(values["speed"]) if values["speed"] else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `fitcheck check --json` prints; bytes are integers."""
        return {
            "plan": self.plan.to_json(),
            "verdict": self.verdict,
            "peak_bytes": self.peak_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "usable_bytes": self.usable_bytes,
            "spare_bytes": self.spare_bytes,
            "ram": {
                "peak_bytes": self.ram.peak_bytes,
                "usable_bytes": self.ram.usable_bytes,
                "verdict": self.ram.verdict,
                "phase": self.ram.phase,
            },
            "peak_phase": self.peak_phase.name,
            "phases": [_phase(phase) for phase in self.phases],
            "source": self.source,
            "outcome": self.outcome,
            "error": self.error and self.error._asdict(),
            "speed": self.speed and self.speed.to_json(),
            "notes": list(self.notes),
            "advice": [fix.to_json() for fix in self.advice],
        }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "moment": phase.peak.name,
        "bytes": phase.peak.bytes,
        "seconds": phase.seconds,
        "terms": [
            {"name": t.name, "role": t.role, "bytes": t.bytes, "place": t.place, "why": t.why}
            for t in phase.terms
            if t.bytes
        ],
    }
