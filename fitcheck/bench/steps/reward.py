"""Reward modelling: a score head learns which of two answers people preferred."""

from __future__ import annotations

from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import random_batch, slices
from fitcheck.bench.steps.losses import ranking_loss
from fitcheck.bench.steps.scoring import scores_of
from fitcheck.plan import Plan


def reward(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` pairs of `sequence` tokens; no logits over the vocabulary."""
    pairs = random_batch(plan, 2 * plan.batch, plan.sequence, roles.device)
    model = roles.policy.train()
    figures: dict[str, Tensor] = {}
    micro_batches = slices(0, 2 * plan.batch, 2 * plan.micro_batch)
    for rows in recorder.repeat(micro_batches):
        with roles.autocast():
            with recorder.phase("update.forward"):
                scores = scores_of(model, pairs.rows(rows))[:, -1].float()
            with recorder.phase("update.loss"):
                loss = ranking_loss(scores)
                figures = {"loss": loss.detach()}
                del scores
        with recorder.phase("update.backward"):
            (loss / len(micro_batches)).backward()
        del loss
    with recorder.phase("update.step"):
        return figures | {"gradient_norm": roles.policy_training.step()}
