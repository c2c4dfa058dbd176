"""Log-probabilities of tokens in the three ways a trainer makes logits, and the losses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitcheck.bench.steps.batches import Batch, inputs

Phases = Callable[[str], AbstractContextManager[Any]]  # "forward" or "loss" -> a recorder's phase


def no_phases(name: str) -> AbstractContextManager[Any]:
    """For a caller that has opened its one phase itself."""
    return nullcontext()


def token_logprobs(
    model: nn.Module, batch: Batch, first: int, loss: str, phase: Phases = no_phases
) -> Tensor:
    """Log-probabilities [rows, tokens - first] of the tokens from position `first` on, in fp32.

    loss="full" makes the logits of every position, as `model(ids).logits` does.
    """
    ids = batch.ids[:, first:]
    with phase("forward"):
        logits = model(**inputs(model, batch)).logits
    with phase("loss"):
        logits = logits.view(*batch.ids.shape, -1)[:, first - 1 : -1].float()
        flat = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
        return -flat.view(ids.shape)


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), averaged over tokens."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """PPO's clipped value loss, as in openai/baselines and TRL."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference): k1 or k3 of joschu.net/blog/kl-approx.html."""
    log_ratio = reference - logprobs
    return -log_ratio if kind == "k1" else log_ratio.exp() - 1 - log_ratio


def advantages_and_returns(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438) over the tokens of [rows, tokens]."""
    tokens = rewards.shape[1]
    last = torch.zeros_like(values[:, 0])
    reverse = []
    for t in reversed(range(tokens)):
        following = values[:, t + 1] if t + 1 < tokens else torch.zeros_like(last)
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        reverse.append(last)
    advantages = torch.stack(reverse[::-1], dim=1)
    return advantages, advantages + values


def whitened(x: Tensor, keep_mean: bool = False) -> Tensor:
    """Scaled to unit variance, and shifted to mean 0 unless that is kept."""
    mean = x.mean()
    scaled = (x - mean) * torch.rsqrt(x.var(unbiased=False) + 1e-8)
    return scaled + mean if keep_mean else scaled


def preference_loss(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """DPO's loss (arXiv 2305.18290, equation 7) from sums of log-probabilities.

    Both [2 x pairs]: the chosen sequences, then the rejected ones.
    """
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def causal_lm_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, with the copies of transformers' ForCausalLMLoss."""
    logits = logits.float()
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), shifted.view(-1))
