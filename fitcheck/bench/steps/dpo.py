"""Direct preference optimization: pairs of a chosen and a rejected answer, no rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, random_batch, slices
from fitcheck.bench.steps.logprobs import token_logprobs
from fitcheck.bench.steps.losses import preference_loss
from fitcheck.plan import Plan


def dpo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` pairs of `sequence` tokens.

    The reference's forward pass stands on top of the policy's graph.
    """
    pairs = random_batch(plan, 2 * plan.batch, plan.sequence, roles.device)
    figures: dict[str, Tensor] = {}
    micro_batches = slices(0, 2 * plan.batch, 2 * plan.micro_batch)
    for rows in recorder.repeat(micro_batches):
        with roles.autocast():
            loss = _pair_loss(plan, roles, pairs.rows(rows), recorder)
            figures = {"loss": loss.detach()}
        with recorder.phase("update.backward"):
            (loss / len(micro_batches)).backward()
        del loss
    with recorder.phase("update.step"):
        return figures | {"gradient_norm": roles.policy_training.step()}


def _pair_loss(plan: Plan, roles: Roles, pairs: Batch, recorder: Recorder) -> Tensor:
    """The loss of a micro-batch: rows of a chosen answer, then of the one rejected for it."""
    policy = roles.policy.train()
    logprobs = token_logprobs(
        policy, pairs, 1, plan.loss, lambda name: recorder.phase(f"update.{name}")
    ).sum(1)
    if plan.reference == "precomputed":
        reference = torch.zeros_like(logprobs)  # read from the data set
    else:
        with recorder.phase("score.reference"):
            reference = _reference_logprobs(plan, roles, pairs, recorder)
    with recorder.phase("update.loss"):
        return preference_loss(logprobs, reference)


@torch.no_grad()
def _reference_logprobs(plan: Plan, roles: Roles, pairs: Batch, recorder: Recorder) -> Tensor:
    """Sums over each sequence [rows], `score_batch` pairs at a time."""
    sums = torch.empty(len(pairs.ids), device=roles.device)
    with roles.acting("reference"):
        model = (roles.reference or roles.policy).eval()
        for rows in recorder.repeat(slices(0, len(pairs.ids), 2 * plan.score_batch)):
            sums[rows] = token_logprobs(model, pairs.rows(rows), 1, plan.loss).sum(1)
    return sums
