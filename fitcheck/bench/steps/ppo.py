"""Proximal policy optimization from a reward model, as InstructGPT does it (arXiv 2203.02155).

A rollout, four models' scores of it, advantages, then epochs of minibatch updates: of the policy,
then of the critic, one after the other; or of both at once where they share their weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, random_batch, slices
from fitcheck.bench.steps.logprobs import token_logprobs, token_logprobs_and_values
from fitcheck.bench.steps.losses import (
    advantages_and_returns,
    kl_estimate,
    policy_loss,
    value_loss,
    whitened,
)
from fitcheck.bench.steps.scoring import (
    emptied,
    rollout,
    score_policy,
    score_reference,
    score_reward,
    scored,
    values_of,
)
from fitcheck.bench.steps.sft import next_token_loss
from fitcheck.plan import Plan

KL_COEFFICIENT = 0.05  # TRL's kl_coef
VALUE_COEFFICIENT = 0.1  # TRL's vf_coef, where policy and critic share one loss
PTX_COEFFICIENT = 27.8  # InstructGPT's, appendix C.4


@dataclass(slots=True)
class Experience:
    """A rollout and what the models say of it: [rows, response] each, but for the batch."""

    batch: Batch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def ppo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One step: `batch` prompts rolled out, `epochs` passes of minibatch updates over them."""
    batch = rollout(plan, roles, recorder)
    experience, figures = _experience(plan, roles, batch, recorder)
    minibatches = slices(0, plan.batch, plan.minibatch)
    for _, minibatch in recorder.repeat(list(product(range(plan.epochs), minibatches))):
        figures |= _update_policy(plan, roles, experience, minibatch, recorder)
        emptied(plan, recorder)
        if roles.critic is not None:
            figures |= _update_critic(plan, roles, experience, minibatch, recorder)
            emptied(plan, recorder)
    return figures


def _experience(
    plan: Plan, roles: Roles, batch: Batch, recorder: Recorder
) -> tuple[Experience, dict[str, Tensor]]:
    """The scores of a rollout, and the advantages that follow from them."""
    if roles.value_head is None:
        logprobs = score_policy(plan, roles, batch, recorder)
        reference = score_reference(plan, roles, batch, recorder)
        rewards = score_reward(plan, roles, batch, recorder)
        values = _score_critic(plan, roles, batch, recorder)
    else:
        logprobs, values = _score_both(plan, roles, batch, recorder).unbind(-1)
        reference = score_reference(plan, roles, batch, recorder)
        rewards = score_reward(plan, roles, batch, recorder)
    with recorder.phase("advantages"):
        kl = torch.zeros_like(logprobs)
        if reference is not None:
            kl = kl_estimate(logprobs, reference, "k1")
        token_rewards = -KL_COEFFICIENT * kl
        token_rewards[:, -1] += rewards
        advantages, returns = advantages_and_returns(
            whitened(token_rewards, keep_mean=True), values
        )
        experience = Experience(batch, logprobs, values, whitened(advantages), returns)
    return experience, {"reward": rewards.mean(), "kl": kl.sum(1).mean()}


def _score_critic(plan: Plan, roles: Roles, batch: Batch, recorder: Recorder) -> Tensor:
    critic = roles.critic
    assert critic is not None
    critic.eval()
    return scored(
        *(plan, roles, batch, "critic"),
        lambda chunk: values_of(plan, critic, chunk),
        *((plan.response,), recorder),
    )


def _score_both(plan: Plan, roles: Roles, batch: Batch, recorder: Recorder) -> Tensor:
    """Log-probabilities and values [rows, response, 2] of one forward pass."""
    policy, head = roles.policy.eval(), roles.value_head
    assert head is not None

    def both(chunk: Batch) -> Tensor:
        return torch.stack(
            token_logprobs_and_values(policy, head, chunk, plan.prompt, plan.loss), dim=-1
        )

    return scored(plan, roles, batch, "policy", both, (plan.response, 2), recorder)


def _update_policy(
    plan: Plan, roles: Roles, experience: Experience, minibatch: slice, recorder: Recorder
) -> dict[str, Tensor]:
    """One optimizer step of the policy (and of a shared critic) over a minibatch."""
    roles.policy.train()
    figures: dict[str, Tensor] = {}
    micro_batches = slices(minibatch.start, minibatch.stop, plan.micro_batch)
    for rows in recorder.repeat(micro_batches):
        with roles.autocast():
            loss, figures = _policy_loss(plan, roles, experience, rows, recorder)
        with recorder.phase("update.policy.backward"):
            (loss / len(micro_batches)).backward()
        del loss
    if plan.ptx_batch:
        _add_ptx_gradients(plan, roles, recorder)
    with recorder.phase("update.policy.step"):
        return figures | {"policy_gradient_norm": roles.policy_training.step()}


def _policy_loss(
    plan: Plan, roles: Roles, experience: Experience, rows: slice, recorder: Recorder
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, with its figures."""
    batch, old = experience.batch.rows(rows), experience.logprobs[rows]

    def phase(name: str) -> AbstractContextManager[Any]:
        return recorder.phase(f"update.policy.{name}")

    if roles.value_head is None:
        logprobs = token_logprobs(roles.policy, batch, plan.prompt, plan.loss, phase)
    else:
        logprobs, values = token_logprobs_and_values(
            roles.policy, roles.value_head, batch, plan.prompt, plan.loss, phase
        )
    with phase("loss"):
        loss = policy_loss(logprobs, old, experience.advantages[rows])
        figures = {"policy_loss": loss.detach(), "ratio": (logprobs - old).exp().mean().detach()}
        if roles.value_head is not None:
            extra = value_loss(values, experience.values[rows], experience.returns[rows])
            figures["value_loss"] = extra.detach()
            loss = loss + VALUE_COEFFICIENT * extra
    return loss, figures


def _add_ptx_gradients(plan: Plan, roles: Roles, recorder: Recorder) -> None:
    """PPO-ptx: the gradients of next-token prediction on pretraining text, on top of PPO's."""
    batch = random_batch(plan, plan.ptx_batch, plan.prompt + plan.response, roles.device)
    for rows in recorder.repeat(slices(0, plan.ptx_batch, plan.micro_batch)):
        micro = batch.rows(rows)
        with roles.autocast():
            loss = next_token_loss(plan, roles, micro, "update.policy", recorder)
        with recorder.phase("update.policy.backward"):
            (loss * PTX_COEFFICIENT * len(micro.ids) / plan.ptx_batch).backward()
        del loss


def _update_critic(
    plan: Plan, roles: Roles, experience: Experience, minibatch: slice, recorder: Recorder
) -> dict[str, Tensor]:
    """One optimizer step of the critic over a minibatch."""
    critic, training = roles.critic, roles.critic_training
    assert critic is not None and training is not None
    critic.train()
    figures: dict[str, Tensor] = {}
    micro_batches = slices(minibatch.start, minibatch.stop, plan.micro_batch)
    with roles.acting("critic"):
        for rows in recorder.repeat(micro_batches):
            with recorder.phase("update.critic.forward"), roles.autocast():
                values = values_of(plan, critic, experience.batch.rows(rows))
                loss = value_loss(values, experience.values[rows], experience.returns[rows])
                figures = {"value_loss": loss.detach()}
                del values
            with recorder.phase("update.critic.backward"):
                (loss / len(micro_batches)).backward()
            del loss
        with recorder.phase("update.critic.step"):
            return figures | {"critic_gradient_norm": training.step()}
