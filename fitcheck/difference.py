"""Two Reports of one plan, phase by phase: what the estimate says and what the dry run saw."""

from __future__ import annotations

from fitcheck.report import ALLOCATED, Phase, Report


def comparison(estimate: Report, traced: Report) -> str:
    """Peak allocated of each phase, by the estimate and by the dry run."""
    lines = [f"{'Peak allocated, MiB':<26}{'estimate':>12}{'dry run':>12}{'difference':>12}"]
    guessed = {phase.name: _allocated(phase) for phase in estimate.phases}
    rows = [(phase.name, guessed.get(phase.name), _allocated(phase)) for phase in traced.phases]
    rows.append(("whole step", estimate.allocated_bytes, traced.allocated_bytes))
    for name, guess, seen in rows:
        if guess is None:
            lines.append(f"{name:<26}{'-':>12}{seen / 2**20:>12,.1f}")
        else:
            off = f"{100 * (guess / max(1, seen) - 1):+.2f} %"
            lines.append(f"{name:<26}{guess / 2**20:>12,.1f}{seen / 2**20:>12,.1f}{off:>12}")
    return "\n".join(lines)


def _allocated(phase: Phase) -> int:
    return max(moment.part(ALLOCATED) for moment in phase.moments)
