"""What keys 1 to 5 apply: the changes that make the plan fit, or, when it fits, the room to spare.

for tip in tips(plan):
    print(tip.words, tip.saves, tip.verdict)      # "offload → reward,critic", bytes, "fits"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fitcheck.advice import ceilings, fixes
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.text import WORDS
from fitcheck.tui.draw import TONES, signed
from fitcheck.tui.knobs import shown
from fitcheck.tui.lines import Line, Span, cut, padded, width
from fitcheck.tui.view import estimated

KEYS = 5


@dataclass(frozen=True, slots=True)
class Tip:
    """One change, or several together. saves: bytes at the peak, below 0 when it takes more."""

    words: str
    effect: str
    saves: int
    verdict: str
    plan: Plan


@lru_cache(maxsize=64)
def tips(plan: Plan) -> list[Tip]:
    """The five that help most; when the plan fits, how far each size may be turned up.

    A search of some 0.1 s, hence not on the way from a key to its answer.
    """
    report = estimated(plan)
    if report.verdict == "fits":
        return _room(plan, report)[:KEYS]
    return [
        Tip(change(fix.changes), fix.effect, fix.saves, fix.verdict, fix.plan)
        for fix in fixes(plan, report, KEYS)
        if fix.changes  # the allocator's variable is no key's business
    ]


def _room(plan: Plan, report: Report) -> list[Tip]:
    """What may be turned up, each to the largest value with which the plan still fits."""
    found = []
    for name, ceiling in ceilings(plan).items():
        if ceiling.plan is None or ceiling.value == ceiling.now:
            continue
        try:
            there = estimated(ceiling.plan)
        except FitCheckError:  # a value that the rules allow and the formulas do not
            continue
        if there.peak_bytes > report.peak_bytes:
            bound = "the most that fits" if ceiling.bound == "memory" else "the most there is"
            saves = report.peak_bytes - there.peak_bytes
            words = change({name: ceiling.value})
            found.append(Tip(words, bound, saves, there.verdict, ceiling.plan))
    return found


def change(changes: Mapping[str, Any]) -> str:
    """Changes in the words of the screen: "tuning → qlora, batch → 4"."""
    return ", ".join(f"{name} → {shown(name, value)}" for name, value in changes.items())


def tip_lines(found: list[Tip], stale: bool, fits: bool, room: int, rows: int) -> list[Line]:
    """A row for each tip: its key, what changes, what that saves; stale: of an earlier plan."""
    title = "ROOM TO SPARE: PRESS 1–5 TO TURN UP" if fits else "PRESS 1–5 TO APPLY"
    head = [Span(title, "head"), Span("  searching…" if stale else "", "dim")]
    if not found and not stale:
        nothing = "nothing more can be turned up" if fits else "no change makes it smaller"
        return [head, [Span(nothing, "dim")]]
    words = min(max([len(tip.words) for tip in found], default=0), room - 14)
    rest = max(1, rows - 1)
    return [head, *(_row(key, tip, words, stale, room) for key, tip in enumerate(found[:rest], 1))]


def _row(key: int, tip: Tip, words: int, stale: bool, room: int) -> Line:
    glyph, verdict = WORDS[tip.verdict]
    click, old = f"app.apply({key})", "dim" if stale else ""
    line = [Span(f"{key} ", old or "key", click), Span(padded(tip.words, words), old, click)]
    line.append(Span(f"{signed(-tip.saves):>8}", old or "bold", click))
    if tip.verdict != "does-not-fit":
        said = f"  {glyph} {verdict.lower()}"
        said = said if width(line) + len(said) <= room else f" {glyph}"
        line.append(Span(said, old or TONES[tip.verdict], click))
    if (left := room - width(line) - 2) > 16:
        line.append(Span("  " + cut(tip.effect, left), "dim", click))
    return line
