"""SFT, DPO, reward modelling and GRPO as TRL's trainers do them (1.16).

Autocast covers a model's forward pass alone, the fused head within it included; DPO's reference
runs after that, on top of the policy's graph. Batches, losses and the optimizer step are those of
the plain steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fitcheck.bench.precision import autocast_dtype
from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, random_batch, slices
from fitcheck.bench.steps.fused import FusedLogprobs
from fitcheck.bench.steps.logprobs import Head, Phase, hidden_states, no_phase
from fitcheck.bench.steps.losses import (
    group_advantages,
    kl_estimate,
    policy_loss,
    preference_loss,
    ranking_loss,
)
from fitcheck.bench.steps.scoring import emptied, rule_reward, scores_of
from fitcheck.bench.steps.trl_generate import generate
from fitcheck.plan import Plan

KL_COEFFICIENT = 0.04  # of GRPO where the plan has a reference; TRL's beta is 0 unless it is set


def logprobs_of(
    roles: Roles, model: Any, batch: Batch, first: int, phase: Phase = no_phase
) -> Tensor:
    """Log-probabilities [rows, tokens - first] of the tokens from `first` on, by the fused head.

    It is given the hidden states that a mask of labels picks (add_fused_lm_head), here all of them.
    """
    with roles.autocast():
        with phase("forward"):
            hidden = hidden_states(model, batch)
        with phase("loss"):
            rows, length = batch.ids.shape
            places = torch.ones(rows, length - first, dtype=torch.bool).nonzero().to(hidden.device)
            row, token = places[:, 0], places[:, 1] + first - 1
            states = hidden[:, :-1][row, token]
            words = batch.ids[:, 1:][row, token]
            del hidden
            head = Head(model)
            dtype = autocast_dtype(states.device) or states.dtype
            arguments = (states, head.weight, head.bias, words, head.scale, head.softcap, dtype)
            found: Tensor = FusedLogprobs.apply(*arguments, True)  # type: ignore[no-untyped-call]
            return found.view(rows, length - first)


def _accumulated(
    roles: Roles,
    micro_batches: list[slice],
    loss_of: Callable[[slice], Tensor],
    update: str,
    recorder: Recorder,
) -> dict[str, Tensor]:
    """Gradients of each micro-batch's loss, then one optimizer step."""
    figures: dict[str, Tensor] = {}
    for rows in recorder.repeat(micro_batches):
        loss = loss_of(rows)
        figures = {"loss": loss.detach()}
        with recorder.phase(f"{update}.backward"):
            (loss / len(micro_batches)).backward()
        del loss
    with recorder.phase(f"{update}.step"):
        return figures | {"gradient_norm": roles.policy_training.step()}


def trl_sft(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` examples of `sequence` tokens."""
    batch = random_batch(plan, plan.batch, plan.sequence, roles.device)
    policy = roles.policy.train()

    def loss_of(rows: slice) -> Tensor:
        return -logprobs_of(roles, policy, batch.rows(rows), 1, _phases(recorder, "update")).mean()

    micro_batches = slices(0, plan.batch, plan.micro_batch)
    return _accumulated(roles, micro_batches, loss_of, "update", recorder)


def trl_dpo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` pairs."""
    pairs = random_batch(plan, 2 * plan.batch, plan.sequence, roles.device)
    policy = roles.policy.train()

    def loss_of(rows: slice) -> Tensor:
        part = pairs.rows(rows)
        logprobs = logprobs_of(roles, policy, part, 1, _phases(recorder, "update")).sum(1)
        reference = torch.zeros_like(logprobs)  # of plans that read it from the data set
        if plan.reference != "precomputed":
            with recorder.phase("score.reference"), roles.acting("reference"), torch.no_grad():
                model = (roles.reference or policy).eval()
                reference = logprobs_of(roles, model, part, 1).sum(1)
                policy.train()
        with recorder.phase("update.loss"):
            return preference_loss(logprobs, reference)

    micro_batches = slices(0, 2 * plan.batch, 2 * plan.micro_batch)
    return _accumulated(roles, micro_batches, loss_of, "update", recorder)


def trl_reward(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` pairs; no logits over the vocabulary."""
    pairs = random_batch(plan, 2 * plan.batch, plan.sequence, roles.device)
    model = roles.policy.train()

    def loss_of(rows: slice) -> Tensor:
        with recorder.phase("update.forward"), roles.autocast():
            scores = scores_of(model, pairs.rows(rows))[:, -1].float()
        with recorder.phase("update.loss"):
            return ranking_loss(scores)

    micro_batches = slices(0, 2 * plan.batch, 2 * plan.micro_batch)
    return _accumulated(roles, micro_batches, loss_of, "update", recorder)


def trl_grpo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One generation of `batch` completions, `epochs` passes of updates over it."""
    prompts = random_batch(plan, plan.batch // plan.group, plan.prompt, roles.device)
    prompts = prompts.repeated(plan.group)
    if plan.rollout == "transformers":
        ids, _ = generate(plan, roles, prompts, recorder)
    else:  # an engine beside the trainer generates
        ids = random_batch(plan, plan.batch, plan.response, roles.device).ids
    batch = prompts.extended(ids)
    emptied(plan, recorder)
    # Where one optimizer step uses up a generation, the update's own log-probabilities stand in.
    aligned = plan.epochs == 1 and plan.minibatch == plan.batch and plan.rollout == "transformers"
    old = None if aligned else _scored(plan, roles, batch, "policy", recorder)
    reference = None
    if plan.reference != "none":
        reference = _scored(plan, roles, batch, "reference", recorder)
    with recorder.phase("advantages"):
        rewards = rule_reward(plan, batch)
        advantages = group_advantages(rewards, plan.group)[:, None]
    policy = roles.policy.train()
    figures: dict[str, Tensor] = {}

    def loss_of(rows: slice) -> Tensor:
        phase = _phases(recorder, "update.policy")
        logprobs = logprobs_of(roles, policy, batch.rows(rows), plan.prompt, phase)
        with phase("loss"):
            before = logprobs.detach() if old is None else old[rows]
            loss = policy_loss(logprobs, before, advantages[rows])
            if reference is not None:
                kl = kl_estimate(logprobs, reference[rows], "k3").mean()
                loss = loss + KL_COEFFICIENT * kl
            return loss

    minibatches = slices(0, plan.batch, plan.minibatch)
    for _, part in recorder.repeat(list(product(range(plan.epochs), minibatches))):
        micro_batches = slices(part.start, part.stop, plan.micro_batch)
        figures = _accumulated(roles, micro_batches, loss_of, "update.policy", recorder)
        emptied(plan, recorder)
    return figures | {"reward": rewards.mean()}


@torch.no_grad()
def _scored(plan: Plan, roles: Roles, batch: Batch, role: str, recorder: Recorder) -> Tensor:
    """One role's log-probabilities [batch, response], a micro-batch at a time."""
    scores = torch.empty(plan.batch, plan.response, device=roles.device)
    with recorder.phase(f"score.{role}"), roles.acting(role):
        model = roles.policy if role == "policy" else roles.reference or roles.policy
        model.eval()
        for rows in recorder.repeat(slices(0, plan.batch, plan.score_batch)):
            scores[rows] = logprobs_of(roles, model, batch.rows(rows), plan.prompt)
    emptied(plan, recorder)
    return scores


def _phases(recorder: Recorder, update: str) -> Phase:
    return lambda name: recorder.phase(f"{update}.{name}")
