"""A bar on standard error that says how far a trace or a measurement is, and in which phase.

    with Bar(phases, "measuring", steps=3) as bar:
        worker.measure(plan, options, bar)      # ████████·················  33% measuring prefill

Nothing is written where nobody watches.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self


class Bar:
    """Each phase of each step is an equal share; a phase may come again within its step.

    Call it with the name of each phase as it begins and, where that is known, with its step: 0 is
    loading. Else a step begins when the first phase comes again.
    """

    WIDTH = 30

    def __init__(self, phases: Sequence[str], what: str = "tracing", steps: int = 2) -> None:
        """phases: of a step, in order, "load" first."""
        self.phases = [name for name in phases if name != "load"]
        self.what, self.steps = what, steps
        self.step = self.most = 0  # the furthest phase of this step

    def __call__(self, phase: str, step: int | None = None) -> None:
        share = self.share(phase, step)
        if not sys.stderr.isatty():
            return
        full = round(share * self.WIDTH)
        bar = "█" * full + "·" * (self.WIDTH - full)
        sys.stderr.write(f"\r\x1b[K{bar} {share:4.0%} {self.what} {phase}")
        sys.stderr.flush()

    def share(self, phase: str, step: int | None = None) -> float:
        """How much is done when this phase begins."""
        place = self.phases.index(phase) if phase in self.phases else 0
        begins = place == 0 and self.most > 0 and phase in self.phases
        now = self.step + begins if step is None else max(0, step - 1)
        if now > self.step:
            self.step, self.most = min(now, self.steps - 1), 0
        self.most = max(self.most, place)
        count = max(1, len(self.phases))
        return (self.step * count + self.most) / (self.steps * count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        if sys.stderr.isatty():  # what follows stands where it stood
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
