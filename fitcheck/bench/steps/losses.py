"""The arithmetic of the methods, on [rows, tokens] tensors of log-probabilities and rewards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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

    Both [2 x pairs]: a chosen sequence, then the one rejected for it.
    """
    chosen, rejected = (policy - reference).view(-1, 2).unbind(1)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def ranking_loss(scores: Tensor) -> Tensor:
    """Bradley-Terry: -log sigmoid of chosen minus rejected (arXiv 2203.02155, equation 1).

    Scores [2 x pairs]: of a chosen sequence, then of the one rejected for it.
    """
    chosen, rejected = scores.view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected).mean()


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """GRPO's advantage of each completion [rows]: its reward, normalized within its group

    (arXiv 2402.03300, section 4.1.2; the 1e-4 is TRL's).
    """
    groups = rewards.view(-1, group)
    centered = groups - groups.mean(1, keepdim=True)
    return (centered / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def causal_lm_loss(logits: Tensor, ids: Tensor, recipe: str, narrow: bool = False) -> Tensor:
    """Mean cross-entropy of the next token, with the copies of transformers' ForCausalLMLoss.

    Up to version 4.48 it shifted the logits, which copies them; since then, the labels.
    narrow: the logits stay in 16 bits, as in the loss that gpt_bigcode had of its own then.
    """
    if not narrow:
        logits = logits.float()
    if recipe == "hf-4.48":
        shifted = logits[:, :-1].contiguous()  # the fp32 logits stay beside it
        return F.cross_entropy(shifted.view(-1, logits.shape[-1]), ids[:, 1:].flatten())
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
