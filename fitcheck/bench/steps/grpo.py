"""Group relative policy optimization (arXiv 2402.03300): PPO whose critic is the group's mean."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import product
from typing import Any

from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, slices
from fitcheck.bench.steps.logprobs import token_logprobs
from fitcheck.bench.steps.losses import group_advantages, kl_estimate, policy_loss
from fitcheck.bench.steps.scoring import (
    emptied,
    rollout,
    score_policy,
    score_reference,
    score_reward,
)
from fitcheck.plan import Plan

KL_COEFFICIENT = 0.04  # the paper's beta


def grpo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One step: `batch` completions, `group` to a prompt, then `epochs` passes of updates."""
    batch = rollout(plan, roles, recorder)
    logprobs = score_policy(plan, roles, batch, recorder)
    reference = score_reference(plan, roles, batch, recorder)
    rewards = score_reward(plan, roles, batch, recorder)
    with recorder.phase("advantages"):
        advantages = group_advantages(rewards, plan.group)[:, None]
    figures = {"reward": rewards.mean()}
    minibatches = slices(0, plan.batch, plan.minibatch)
    for _, minibatch in recorder.repeat(list(product(range(plan.epochs), minibatches))):
        figures |= _update(
            plan, roles, batch, minibatch, (logprobs, reference, advantages), recorder
        )
        emptied(plan, recorder)
    return figures


def _update(
    plan: Plan,
    roles: Roles,
    batch: Batch,
    minibatch: slice,
    scores: tuple[Tensor, Tensor | None, Tensor],
    recorder: Recorder,
) -> dict[str, Tensor]:
    """One optimizer step over a minibatch; scores are log-probabilities before, those of the

    reference, and advantages.
    """
    old, reference, advantages = scores
    policy = roles.policy.train()

    def phase(name: str) -> AbstractContextManager[Any]:
        return recorder.phase(f"update.policy.{name}")

    figures: dict[str, Tensor] = {}
    micro_batches = slices(minibatch.start, minibatch.stop, plan.micro_batch)
    for rows in recorder.repeat(micro_batches):
        with roles.autocast():
            logprobs = token_logprobs(policy, batch.rows(rows), plan.prompt, plan.loss, phase)
            with phase("loss"):
                loss = policy_loss(logprobs, old[rows], advantages[rows])
                figures = {"policy_loss": loss.detach()}
                if reference is not None:
                    kl = kl_estimate(logprobs, reference[rows], "k3").mean()
                    figures["kl"] = kl.detach()
                    loss = loss + KL_COEFFICIENT * kl
                    del kl
                del logprobs
        with phase("backward"):
            (loss / len(micro_batches)).backward()
        del loss
    with phase("step"):
        return figures | {"gradient_norm": roles.policy_training.step()}
