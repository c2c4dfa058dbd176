"""Every model's forward passes over a finished rollout, and what they score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles, Scorer
from fitcheck.bench.steps.batches import Batch, inputs, random_batch, slices
from fitcheck.bench.steps.generate import generate
from fitcheck.bench.steps.logprobs import token_logprobs
from fitcheck.plan import Plan


def rollout(plan: Plan, roles: Roles, recorder: Recorder) -> Batch:
    """Prompts with sampled responses: `batch` rows, in groups of the same prompt for GRPO.

    An engine beside the trainer generates with memory of its own; its tokens are then random here.
    """
    prompts = random_batch(plan, plan.batch // (plan.group or 1), plan.prompt, roles.device)
    prompts = prompts.repeated(plan.group or 1)
    if plan.rollout == "transformers":
        responses = generate(roles, prompts, plan.response, recorder)
    else:
        responses = random_batch(plan, plan.batch, plan.response, roles.device).ids
    emptied(plan, recorder)
    return prompts.extended(responses)


@torch.no_grad()
def scored(
    plan: Plan,
    roles: Roles,
    batch: Batch,
    role: str,
    score: Callable[[Batch], Tensor],
    width: tuple[int, ...],
    recorder: Recorder,
) -> Tensor:
    """One role's scores [rows, *width] in fp32, `score_batch` sequences at a time."""
    with recorder.phase(f"score.{role}"), roles.acting(role), roles.autocast():
        scores = torch.empty(len(batch.ids), *width, device=roles.device)
        for rows in recorder.repeat(slices(0, len(batch.ids), plan.score_batch)):
            scores[rows] = score(batch.rows(rows))
    emptied(plan, recorder)
    return scores


def score_policy(plan: Plan, roles: Roles, batch: Batch, recorder: Recorder) -> Tensor:
    """Log-probabilities [rows, response] that the policy gave its tokens."""
    policy = roles.policy.eval()
    return scored(
        *(plan, roles, batch, "policy"),
        lambda chunk: token_logprobs(policy, chunk, plan.prompt, plan.loss),
        *((plan.response,), recorder),
    )


def score_reference(plan: Plan, roles: Roles, batch: Batch, recorder: Recorder) -> Tensor | None:
    """Log-probabilities [rows, response] by the reference; None where there is none."""
    if plan.reference == "none":
        return None
    model = (roles.reference or roles.policy).eval()
    return scored(
        *(plan, roles, batch, "reference"),
        lambda chunk: token_logprobs(model, chunk, plan.prompt, plan.loss),
        *((plan.response,), recorder),
    )


def score_reward(plan: Plan, roles: Roles, batch: Batch, recorder: Recorder) -> Tensor:
    """A reward [rows] for each sequence: the reward model's at its last token, or a rule's."""
    reward = roles.reward
    if reward is None:
        return rule_reward(plan, batch)
    reward.eval()
    return scored(
        *(plan, roles, batch, "reward"),
        lambda chunk: scores_of(reward, chunk)[:, -1],
        *((), recorder),
    )


def rule_reward(plan: Plan, batch: Batch) -> Tensor:
    """A reward without a model: the share of response tokens in the vocabulary's first half."""
    half = plan.model.vocab_size // 2
    return (batch.ids[:, plan.prompt :] < half).float().mean(1)


def scores_of(scorer: Scorer, batch: Batch) -> Tensor:
    """A score at every position [rows, tokens]."""
    scores: Any = scorer(**inputs(scorer.backbone, batch))
    return scores.view(batch.ids.shape)  # type: ignore[no-any-return]


def values_of(plan: Plan, critic: Scorer, batch: Batch) -> Tensor:
    """The critic's value [rows, response] before each response token, in fp32."""
    return scores_of(critic, batch)[:, plan.prompt - 1 : -1].float()


def emptied(plan: Plan, recorder: Recorder) -> None:
    """Between two phases: return free memory to the driver, where the plan says so."""
    if plan.empty_cache:
        recorder.empty_cache()
