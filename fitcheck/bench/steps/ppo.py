"""Proximal policy optimization from a reward model, as InstructGPT does it (arXiv 2203.02155).

A rollout, four models' scores of it, advantages, then epochs of minibatch updates: of the policy,
then of the critic, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, inputs, random_batch
from fitcheck.bench.steps.generate import generate
from fitcheck.bench.steps.losses import (
    advantages_and_returns,
    kl_estimate,
    policy_loss,
    token_logprobs,
    value_loss,
    whitened,
)
from fitcheck.plan import Plan

KL_COEFFICIENT = 0.05  # TRL's kl_coef


@dataclass(slots=True)
class Experience:
    """A rollout and what the models say of it; [rows, response] each, but for the batch."""

    batch: Batch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def ppo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One step: `batch` prompts rolled out, `epochs` passes of minibatch updates over them."""
    prompts = random_batch(plan, plan.batch, plan.prompt, roles.device)
    batch = prompts.extended(generate(roles, prompts, plan.response, recorder))
    experience, figures = _experience(plan, roles, batch, recorder)
    for _ in range(plan.epochs):
        for start in range(0, plan.batch, plan.minibatch):
            part = slice(start, start + plan.minibatch)
            figures |= _update_policy(plan, roles, experience, part, recorder)
            figures |= _update_critic(plan, roles, experience, part, recorder)
    return figures


@torch.no_grad()
def _experience(
    plan: Plan, roles: Roles, batch: Batch, recorder: Recorder
) -> tuple[Experience, dict[str, Tensor]]:
    """Scores of a rollout by every model, `score_batch` sequences at a time."""
    def policy(chunk: Batch) -> Tensor:
        return token_logprobs(roles.policy, chunk, plan.prompt, plan.loss)

    def reference(chunk: Batch) -> Tensor:
        model = (roles.reference or roles.policy).eval()
        return token_logprobs(model, chunk, plan.prompt, plan.loss)

    def critic(chunk: Batch) -> Tensor:
        return _values(plan, roles, chunk)

    def reward(chunk: Batch) -> Tensor:
        return roles.reward(**inputs(roles.reward.backbone, chunk))[:, -1].float()

    for module in (roles.policy, roles.critic):
        if module is not None:
            module.eval()
    logprobs = _scored(plan, roles, batch, "policy", policy, recorder)
    reference_logprobs = logprobs
    if plan.reference != "none":
        reference_logprobs = _scored(plan, roles, batch, "reference", reference, recorder)
    if plan.reward_model == "rule":
        reward = rule_reward_of(plan)
    scores = _scored(plan, roles, batch, "reward", reward, recorder)
    values = _scored(plan, roles, batch, "critic", critic, recorder)
    with recorder.phase("advantages"):
        kl = kl_estimate(logprobs, reference_logprobs, "k1")
        rewards = -KL_COEFFICIENT * kl
        rewards[:, -1] += scores
        advantages, returns = advantages_and_returns(whitened(rewards, keep_mean=True), values)
        advantages = whitened(advantages)
    figures = {"reward": scores.mean(), "kl": kl.sum(1).mean()}
    return Experience(batch, logprobs, values, advantages, returns), figures


def _scored(
    plan: Plan,
    roles: Roles,
    batch: Batch,
    role: str,
    score: Callable[[Batch], Tensor],
    recorder: Recorder,
) -> Tensor:
    """One role's scores of all rows."""
    with recorder.phase(f"score.{role}"), roles.autocast(), roles.acting(role):
        return torch.cat([score(chunk) for chunk in batch.micro_batches(plan.score_batch)])


def rule_reward_of(plan: Plan) -> Callable[[Batch], Tensor]:
    """The reward without a model: the share of response tokens in the vocabulary's first half."""
    half = plan.model.vocab_size // 2
    return lambda batch: (batch.ids[:, plan.prompt :] < half).float().mean(1)


def _values(plan: Plan, roles: Roles, batch: Batch) -> Tensor:
    """The critic's value before each response token, in fp32."""
    critic: Any = roles.critic
    return critic(**inputs(critic.backbone, batch))[:, plan.prompt - 1 : -1].float()  # type: ignore[no-any-return]


def _update_policy(
    plan: Plan, roles: Roles, experience: Experience, part: slice, recorder: Recorder
) -> dict[str, Tensor]:
    """One optimizer step of the policy over a minibatch."""
    roles.policy.train()
    for rows in _micro_batches(plan, part):
        batch = experience.batch.rows(rows.start, rows.stop)
        with roles.autocast():
            logprobs = token_logprobs(
                roles.policy,
                batch,
                plan.prompt,
                plan.loss,
                lambda name: recorder.phase(f"update.policy.{name}"),
            )
            with recorder.phase("update.policy.loss"):
                loss = policy_loss(logprobs, experience.logprobs[rows], experience.advantages[rows])
                ratio = (logprobs - experience.logprobs[rows]).exp().mean().detach()
        with recorder.phase("update.policy.backward"):
            (loss * plan.micro_batch / plan.minibatch).backward()
        del logprobs
    with recorder.phase("update.policy.step"):
        norm = roles.policy_training.step()
    return {"policy_loss": loss.detach(), "ratio": ratio, "policy_gradient_norm": norm}


def _update_critic(
    plan: Plan, roles: Roles, experience: Experience, part: slice, recorder: Recorder
) -> dict[str, Tensor]:
    """One optimizer step of the critic over a minibatch."""
    assert roles.critic is not None and roles.critic_training is not None
    roles.critic.train()
    with roles.acting("critic"):
        for rows in _micro_batches(plan, part):
            batch = experience.batch.rows(rows.start, rows.stop)
            with recorder.phase("update.critic.forward"), roles.autocast():
                values = _values(plan, roles, batch)
                loss = value_loss(values, experience.values[rows], experience.returns[rows])
            with recorder.phase("update.critic.backward"):
                (loss * plan.micro_batch / plan.minibatch).backward()
        with recorder.phase("update.critic.step"):
            norm = roles.critic_training.step()
    return {"value_loss": loss.detach(), "critic_gradient_norm": norm}


def _micro_batches(plan: Plan, part: slice) -> list[slice]:
    starts = range(part.start, part.stop, plan.micro_batch)
    return [slice(start, start + plan.micro_batch) for start in starts]
