"""A line on standard error that says how far a trace or a measurement is, and in which phase.

    with Bar("measuring", phases, steps=3) as bar:
        bar.show("rollout.decode", 1)      # measuring  ██████░░░░░░░░░░░░░░  rollout.decode

Nothing is written where nobody watches.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self

WIDTH = 24  # cells of the bar


class Bar:
    """phases: in the order in which a step goes through them, `load` before all steps."""

    def __init__(self, what: str, phases: Sequence[str], steps: int) -> None:
        self.what = what
        self.places = {name: at for at, name in enumerate(p for p in phases if p != "load")}
        self.steps = steps
        self.share = 0.0
        self.watched = sys.stderr.isatty()

    def show(self, phase: str, step: int) -> None:
        """That phase of that step begins; step 0 is loading. It never goes back: phases repeat."""
        each = max(1, len(self.places))
        passed = max(0, step - 1) * each + self.places.get(phase, 0) if step else 0
        self.share = max(self.share, min(1.0, passed / (each * self.steps)))
        if self.watched:
            cells = round(self.share * WIDTH)
            drawn = "█" * cells + "░" * (WIDTH - cells)
            sys.stderr.write(f"\r\x1b[K{self.what}  {drawn}  {phase}")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        if self.watched:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
