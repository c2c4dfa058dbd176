"""Direct preference optimization: pairs of a chosen and a rejected answer, no rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, random_batch
from fitcheck.bench.steps.losses import preference_loss, token_logprobs
from fitcheck.plan import Plan


def dpo(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` pairs of `sequence` tokens.

    The reference's forward pass stands on top of the policy's graph.
    """
    pairs = random_batch(plan, 2 * plan.batch, plan.sequence, roles.device)
    known = torch.zeros(2 * plan.batch, device=roles.device)  # of a precomputed reference
    micro_batches = pairs.micro_batches(2 * plan.micro_batch)
    for micro in micro_batches:
        roles.policy.train()
        with roles.autocast():
            logprobs = token_logprobs(
                roles.policy, micro, 1, plan.loss, lambda name: recorder.phase(f"update.{name}")
            ).sum(1)
            reference = known[: len(micro.ids)]
            if plan.reference != "precomputed":
                with recorder.phase("score.reference"):
                    reference = _reference_logprobs(plan, roles, micro)
            with recorder.phase("update.loss"):
                loss = preference_loss(logprobs, reference)
        with recorder.phase("update.backward"):
            (loss / len(micro_batches)).backward()
    with recorder.phase("update.step"):
        norm = roles.policy_training.step()
    return {"loss": loss.detach(), "gradient_norm": norm}


@torch.no_grad()
def _reference_logprobs(plan: Plan, roles: Roles, pairs: Batch) -> Tensor:
    """Sums over each sequence; all of the micro-batch at once, or `score_batch` pairs at a time."""
    with roles.acting("reference"):
        model = (roles.reference or roles.policy).eval()
        chunks = pairs.micro_batches(2 * plan.score_batch)
        return torch.cat([token_logprobs(model, c, 1, plan.loss).sum(1) for c in chunks])
