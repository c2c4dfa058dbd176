"""What a step tells whoever watches it: the dry run and the measurement override these methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Recorder:
    """Watches nothing.

    A phase's name comes again when the phase does: for each micro-batch, for each epoch.
    """

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """The region of a phase named as in a Report: "rollout.prefill", "update.policy.loss"."""
        return nullcontext()

    def decode(self, steps: range) -> Iterable[int]:
        """The decode steps to run; they are alike but for a growing cache."""
        return steps

    def repeat(self, rounds: Sequence[T]) -> Iterable[T]:
        """The rounds to run of a loop over micro-batches, minibatches, epochs or chunks.

        They are alike in memory from the second on, but for Adam's states in the first update.
        """
        return rounds

    def empty_cache(self) -> None:
        """Called where a plan with `empty_cache` returns free memory to the driver."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
