"""What a step tells whoever watches it: the dry run and the measurement override both methods."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Recorder:
    """Watches nothing. `recorder.phase(name)` is entered around each phase of a step.

    A name comes again when its phase does: for each micro-batch, for each epoch.
    """

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """The region of a phase named as in a Report: "rollout.prefill", "update.policy.loss"."""
        return nullcontext()

    def decode(self, steps: range) -> Iterable[int]:
        """The decode steps to run; they are alike but for a growing cache."""
        return steps
