"""PPO as TRL's PPOTrainer does it (trl.experimental.ppo, up to 1.12.0), with all that it keeps.

Four models stay on the card. A rollout leaves its fp32 scores of the whole vocabulary until the
next one has made its own. An update runs the critic and then the policy, both graphs alive at once,
with every layer's hidden states and a KV cache, since checkpointing is never switched on; one
optimizer trains both. The last micro-batch's outputs stay while the next one runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles, Scorer
from fitcheck.bench.steps.batches import Batch, inputs, random_batch, slices
from fitcheck.bench.steps.losses import (
    advantages_and_returns,
    policy_loss,
    value_loss,
    whitened,
)
from fitcheck.bench.steps.ppo import KL_COEFFICIENT, VALUE_COEFFICIENT, Experience
from fitcheck.bench.steps.trl_generate import generate
from fitcheck.plan import Plan

TEMPERATURE = 0.7  # ppo_config.py


def trl_ppo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One rollout of `batch` prompts, `epochs` optimizer steps over it."""
    batch, scores = _rollout(plan, roles, recorder)
    roles.kept = scores  # the former rollout's are let go only now
    del scores
    experience, figures = _experience(plan, roles, batch, recorder)
    for _ in recorder.repeat(range(plan.epochs)):
        minibatches = list(recorder.repeat(slices(0, plan.batch, plan.minibatch)))
        for rows in minibatches:
            last = rows is minibatches[-1]
            figures |= _update(plan, roles, experience, rows, last, recorder)
            recorder.empty_cache()
    return figures


@torch.no_grad()
def _rollout(plan: Plan, roles: Roles, recorder: Recorder) -> tuple[Batch, Tensor]:
    """Prompts with their responses, and the scores [batch, response, V] that they were drawn from.

    Each chunk's scores are stacked, then all chunks' are copied together.
    """
    prompts = random_batch(plan, plan.batch, plan.prompt, roles.device)
    ids, chunks = [], []
    for rows in slices(0, plan.batch, plan.score_batch):
        response, scores = generate(plan, roles, prompts.rows(rows), recorder, TEMPERATURE)
        ids.append(response)
        chunks.append(scores)
        del response, scores
    with recorder.phase("rollout.scores"):
        together = torch.cat(chunks)
    return prompts.extended(torch.cat(ids)), together


@torch.no_grad()
def _experience(
    plan: Plan, roles: Roles, batch: Batch, recorder: Recorder
) -> tuple[Experience, dict[str, Tensor]]:
    """What four models say of the rollout, `score_batch` sequences at a time."""
    reward, critic = roles.reward, roles.critic
    assert reward is not None and critic is not None
    tokens = (plan.batch, plan.response)
    logprobs, reference, values = (torch.empty(tokens, device=roles.device) for _ in range(3))
    rewards = torch.empty(plan.batch, device=roles.device)
    for rows in recorder.repeat(slices(0, plan.batch, plan.score_batch)):
        part = batch.rows(rows)
        ids = part.ids[:, plan.prompt :]
        with recorder.phase("score.policy"):
            logprobs[rows] = selected_logprobs(roles.kept[rows], ids)
        recorder.empty_cache()
        with recorder.phase("score.reference"), roles.acting("reference"):
            output = with_hidden_states(roles.reference or roles.policy, part)
            logits = output.logits[:, plan.prompt - 1 : -1]
            logits /= TEMPERATURE
            reference[rows] = selected_logprobs(logits, ids)
            del output, logits
        recorder.empty_cache()
        with recorder.phase("score.critic"):
            values[rows] = _scores(critic, part)[:, plan.prompt - 1 : -1].float()
        with recorder.phase("score.reward"):
            rewards[rows] = _scores(reward, part)[:, -1].float()
    recorder.empty_cache()
    with recorder.phase("advantages"):
        kl = logprobs - reference
        token_rewards = -KL_COEFFICIENT * kl
        token_rewards[:, -1] += rewards
        advantages, returns = advantages_and_returns(token_rewards, values)
        experience = Experience(batch, logprobs, values, whitened(advantages), returns)
    recorder.empty_cache()
    return experience, {"reward": rewards.mean(), "kl": kl.sum(1).mean()}


def _update(
    plan: Plan, roles: Roles, experience: Experience, rows: slice, last: bool, recorder: Recorder
) -> dict[str, Tensor]:
    """A minibatch of micro-batches; the optimizer steps once an epoch, at the end of its `last`.

    A micro-batch's output, logits and probabilities are let go when the next one's replace them.
    """
    figures: dict[str, Tensor] = {}
    first = plan.prompt
    micro_batches = list(recorder.repeat(slices(rows.start, rows.stop, plan.micro_batch)))
    for micro in micro_batches:
        batch, old = experience.batch.rows(micro), experience.logprobs[micro]
        with recorder.phase("update.forward"):
            output, values = _both(roles, batch)
        with recorder.phase("update.loss"):
            logits = output.logits[:, first - 1 : -1]
            logits /= TEMPERATURE
            logprobs = selected_logprobs(logits, batch.ids[:, first:]).float()
            values = values[:, first - 1 : -1].float()
            policy = policy_loss(logprobs, old, experience.advantages[micro])
            value = value_loss(values, experience.values[micro], experience.returns[micro])
            loss = policy + VALUE_COEFFICIENT * value
        with recorder.phase("update.backward"):
            (loss * plan.micro_batch / plan.batch).backward()
        if last and micro is micro_batches[-1]:
            with recorder.phase("update.step"):
                roles.policy_training.optimizer.step()
                roles.policy_training.optimizer.zero_grad(set_to_none=True)
        with recorder.phase("update.statistics"), torch.no_grad():
            probabilities = F.softmax(logits, dim=-1)
            entropy = torch.logsumexp(logits, dim=-1) - (probabilities * logits).sum(-1)
        figures = {"policy_loss": policy.detach(), "value_loss": value.detach()}
        figures["entropy"] = entropy.mean()
    return figures


def _both(roles: Roles, batch: Batch) -> tuple[Any, Tensor]:
    """The policy's whole output on top of the critic's, and the critic's values [rows, tokens]."""
    critic = roles.critic
    assert critic is not None
    output = with_hidden_states(critic.backbone, batch)
    values = critic.head(output.hidden_states[-1])[..., 0]
    return with_hidden_states(roles.policy, batch), values


def with_hidden_states(model: nn.Module, batch: Batch, use_cache: bool = True) -> Any:
    """A forward pass that returns every layer's hidden states and, by default, a KV cache."""
    arguments = inputs(model, batch) | {"use_cache": use_cache, "output_hidden_states": True}
    return model(**arguments)


def _scores(scorer: Scorer, batch: Batch) -> Tensor:
    """A score at every position [rows, tokens]."""
    output = with_hidden_states(scorer.backbone, batch, use_cache=False)
    scores: Tensor = scorer.head(output.hidden_states[-1])
    return scores[..., 0]


def selected_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [rows, tokens] of ids: a row at a time (TRL's selective_log_softmax)."""
    places = ids[..., None]
    if logits.dtype == torch.float32:
        chosen = logits.gather(-1, places)[..., 0]
        return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    rows = [
        F.log_softmax(row, dim=-1).gather(-1, place)
        for row, place in zip(logits, places, strict=True)
    ]
    return torch.stack(rows)[..., 0]
