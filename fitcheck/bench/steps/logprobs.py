"""Log-probabilities of the tokens of a batch, in the three ways that trainers make logits.

full: the logits of every position, as `model(ids).logits` is. chunked: the head and the loss for
256 tokens at a time, made again in backward. fused: in tiles, by steps/fused.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fitcheck.bench.precision import autocast_dtype, checkpoint_contexts
from fitcheck.bench.steps.batches import Batch, inputs
from fitcheck.bench.steps.fused import FusedLogprobs

CHUNK = 256  # tokens, as TRL's chunked loss takes

Phase = Callable[[str], AbstractContextManager[Any]]  # "forward" or "loss" -> a recorder's phase


def no_phase(name: str) -> AbstractContextManager[Any]:
    """For a caller that has opened its one phase itself."""
    return nullcontext()


class Head:
    """A causal model's vocabulary head: hidden states [..., H] -> logits [..., V].

    With what some models do to their logits: Gemma 2 caps, Cohere and Granite scale them.
    """

    def __init__(self, model: Any) -> None:
        config, linear = model.config, model.get_output_embeddings()
        self.weight, self.bias = linear.weight, linear.bias
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def token_logprobs(
    model: Any, batch: Batch, first: int, loss: str, phase: Phase = no_phase
) -> Tensor:
    """Log-probabilities [rows, tokens - first] of the tokens from position `first` on, in fp32."""
    if loss == "full":
        with phase("forward"):
            logits = model(**inputs(model, batch)).logits
        with phase("loss"):
            logits = logits.view(*batch.ids.shape, -1)[:, first - 1 : -1].float()
            return _of_logits(logits, batch.ids[:, first:])
    with phase("forward"):
        hidden = hidden_states(model, batch)[:, first - 1 : -1]
    with phase("loss"):
        return _of_hidden(Head(model), hidden, batch.ids[:, first:], loss)


def token_logprobs_and_values(
    model: Any, value_head: nn.Module, batch: Batch, first: int, loss: str, phase: Phase = no_phase
) -> tuple[Tensor, Tensor]:
    """The same, and a value for each of those tokens by a head on the same hidden states."""
    head = Head(model)
    with phase("forward"):
        hidden = hidden_states(model, batch)
        values = value_head(hidden)[:, first - 1 : -1, 0].float()
        logits = head(hidden) if loss == "full" else None
        hidden = hidden[:, first - 1 : -1]
    with phase("loss"):
        if logits is None:
            return _of_hidden(head, hidden, batch.ids[:, first:], loss), values
        del hidden
        logits = logits[:, first - 1 : -1].float()
        return _of_logits(logits, batch.ids[:, first:]), values


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """What the head of a model is given: [rows, tokens, H]."""
    hidden = model.base_model(**inputs(model.base_model, batch)).last_hidden_state
    return hidden.view(*batch.ids.shape, -1)  # type: ignore[no-any-return]


def _of_logits(logits: Tensor, ids: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return -flat.view(ids.shape)


def _of_hidden(head: Head, hidden: Tensor, ids: Tensor, loss: str) -> Tensor:
    """Log-probabilities of `ids` from the hidden states before them, never all logits at once."""
    flat, words = hidden.flatten(0, 1), ids.flatten()
    if loss == "fused":
        dtype = autocast_dtype(flat.device) or flat.dtype
        arguments = (flat, head.weight, head.bias, words, head.scale, head.softcap, dtype)
        logprobs: Tensor = FusedLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
        return logprobs.view(ids.shape)
    chunks = zip(flat.split(CHUNK), words.split(CHUNK), strict=True)
    return torch.cat([_chunk(head, *chunk) for chunk in chunks]).view(ids.shape)


def _chunk(head: Head, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of one chunk; its logits are made again in backward."""

    def logprobs(hidden: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden).float(), ids, reduction="none")

    if not torch.is_grad_enabled():
        return logprobs(hidden)
    return checkpoint(  # type: ignore[no-any-return]
        logprobs, hidden, use_reentrant=False, context_fn=checkpoint_contexts
    )
