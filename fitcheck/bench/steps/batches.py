"""Batches of random tokens on any device, and what of them a model takes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitcheck.plan import Plan


@dataclass(slots=True)
class Batch:
    """Token ids [rows, tokens] and which of them are real; no mask where all are."""

    ids: Tensor
    mask: Tensor | None = None
    packed: bool = False  # in one row, told apart by their positions

    def rows(self, part: slice) -> Batch:
        """Some of the rows."""
        return Batch(self.ids[part], None if self.mask is None else self.mask[part], self.packed)

    def repeated(self, times: int) -> Batch:
        """Each row that many times in a row."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Batch(self.ids.repeat_interleave(times, 0), mask, self.packed)

    def extended(self, ids: Tensor) -> Batch:
        """With these tokens behind those of each row."""
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
        return Batch(torch.cat([self.ids, ids], dim=1), mask, self.packed)


def random_batch(plan: Plan, rows: int, tokens: int, device: torch.device) -> Batch:
    """Random ids. When the plan pads, every row begins with one to four padding tokens.

    Every row, because a micro-batch whose rows need no padding takes another attention kernel.
    """
    ids = torch.randint(plan.model.vocab_size, (rows, tokens), device=device)
    if plan.padding != "padded":
        return Batch(ids, packed=plan.padding == "packed")
    padding = 1 + torch.arange(rows, device=device) % 4
    mask = torch.arange(tokens, device=device) >= padding[:, None]
    return Batch(ids, mask.long())


def inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments of a model's forward pass over whole sequences, without a cache."""
    rows, tokens = batch.ids.shape
    if batch.packed:
        ends = torch.arange(0, rows * tokens + 1, tokens, device=batch.ids.device).int()
        return {
            "input_ids": batch.ids.reshape(1, -1),
            "position_ids": torch.arange(tokens, device=batch.ids.device).repeat(1, rows),
            **{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
            **{"max_length_q": tokens, "max_length_k": tokens, "use_cache": False},
        }
    arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
    if batch.mask is not None:
        arguments["attention_mask"] = batch.mask
        if takes_positions(model):
            arguments["position_ids"] = positions(batch.mask)
    return arguments


def positions(mask: Tensor) -> Tensor:
    """Each real token's position in its sequence; 0 for the padding before it."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def takes_positions(model: nn.Module) -> bool:
    """Whether the model is told positions (BLOOM and MPT see the padding mask alone)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Consecutive slices of that size."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def cache_argument(model: nn.Module) -> str:
    """What a model calls its key-value cache: `cache` from transformers 5.24 on."""
    named = inspect.signature(model.forward).parameters
    return "cache" if "cache" in named else "past_key_values"
