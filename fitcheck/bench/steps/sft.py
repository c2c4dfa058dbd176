"""Supervised fine-tuning: next-token cross-entropy over whole examples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, inputs, random_batch
from fitcheck.bench.steps.losses import causal_lm_loss, token_logprobs
from fitcheck.plan import Plan


def sft(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` examples of `sequence` tokens."""
    batch = random_batch(plan, plan.batch, plan.sequence, roles.device)
    roles.policy.train()
    micro_batches = batch.micro_batches(plan.micro_batch)
    for micro in micro_batches:
        with roles.autocast():
            loss = _loss(plan, roles, micro, recorder)
        with recorder.phase("update.backward"):
            (loss / len(micro_batches)).backward()
    with recorder.phase("update.step"):
        norm = roles.policy_training.step()
    return {"loss": loss.detach(), "gradient_norm": norm}


def _loss(plan: Plan, roles: Roles, batch: Batch, recorder: Recorder) -> Tensor:
    def phase(name: str) -> Any:
        return recorder.phase(f"update.{name}")

    if plan.loss != "full":
        return -token_logprobs(roles.policy, batch, 1, plan.loss, phase).mean()
    with phase("forward"):
        logits = roles.policy(**inputs(roles.policy, batch)).logits
    with phase("loss"):  # the 16-bit logits stay alive, as they do inside transformers' forward
        return causal_lm_loss(logits.view(*batch.ids.shape, -1), batch.ids)
