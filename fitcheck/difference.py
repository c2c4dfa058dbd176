"""Two Reports of one plan, term by term: what the estimate says and what the dry run saw."""

from __future__ import annotations

from fitcheck.report import ALLOCATED, Moment, Phase, Report

LEAST = 2**20  # bytes: a term smaller in both has no line of its own
ROUNDED = ("allocator rounding", "other, and rounding")  # of blocks; the estimate's is by role


def comparison(estimate: Report, traced: Report) -> str:
    """Peak allocated of each phase and the terms of that moment, by estimate and by dry run."""
    lines = [f"{'Peak allocated, MiB':<38}{'estimate':>11}{'dry run':>11}{'difference':>12}"]
    guessed = {phase.name: phase for phase in estimate.phases}
    for phase in traced.phases:
        guess, seen = guessed.get(phase.name), fullest(phase)
        mine = fullest(guess).part(ALLOCATED) if guess else None
        lines.append(_line(phase.name, mine, seen.part(ALLOCATED)))
        if guess:
            lines += _terms(fullest(guess), seen)
    lines.append(_line("whole step", estimate.allocated_bytes, traced.allocated_bytes))
    return "\n".join(lines)


def fullest(phase: Phase) -> Moment:
    """The moment of a phase at which most is allocated."""
    return max(phase.moments, key=lambda moment: moment.part(ALLOCATED))


def _terms(guess: Moment, seen: Moment) -> list[str]:
    """A line for each term that either has, the largest first, and one for all small ones."""
    mine, theirs = _by_name(guess), _by_name(seen)
    names = sorted(mine | theirs, key=lambda name: -max(mine.get(name, 0), theirs.get(name, 0)))
    lines, small = [], [0, 0]
    for name in names:
        pair = mine.get(name, 0), theirs.get(name, 0)
        if max(pair) < LEAST or name in ROUNDED:
            small = [a + b for a, b in zip(small, pair, strict=True)]
        else:
            lines.append(_line("  " + name, *pair))
    return [*lines, _line("  " + ROUNDED[1], *small)]


def _by_name(moment: Moment) -> dict[str, int]:
    sums: dict[str, int] = {}
    for term in moment.terms:
        if term.place == ALLOCATED and term.bytes:
            name = term.name if term.name in ROUNDED else f"{term.role} {term.name}"
            sums[name] = sums.get(name, 0) + term.bytes
    return sums


def _line(name: str, guess: int | None, seen: int) -> str:
    if guess is None:
        return f"{name:<38}{'-':>11}{seen / 2**20:>11,.1f}"
    off = f"{100 * (guess / seen - 1):+.2f} %" if guess and seen else "-"
    return f"{name:<38}{guess / 2**20:>11,.1f}{seen / 2**20:>11,.1f}{off:>12}"
