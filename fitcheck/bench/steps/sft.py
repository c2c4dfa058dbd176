"""Supervised fine-tuning: next-token cross-entropy over whole examples."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, inputs, random_batch, slices
from fitcheck.bench.steps.logprobs import token_logprobs
from fitcheck.bench.steps.losses import causal_lm_loss
from fitcheck.plan import Plan


def sft(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One optimizer step over `batch` examples of `sequence` tokens."""
    batch = random_batch(plan, plan.batch, plan.sequence, roles.device)
    roles.policy.train()
    figures: dict[str, Tensor] = {}
    micro_batches = slices(0, plan.batch, plan.micro_batch)
    for rows in recorder.repeat(micro_batches):
        with roles.autocast():
            loss = next_token_loss(plan, roles, batch.rows(rows), "update", recorder)
            figures = {"loss": loss.detach()}
        with recorder.phase("update.backward"):
            (loss / len(micro_batches)).backward()
        del loss
    with recorder.phase("update.step"):
        return figures | {"gradient_norm": roles.policy_training.step()}


def next_token_loss(
    plan: Plan, roles: Roles, batch: Batch, update: str, recorder: Recorder
) -> Tensor:
    """Mean cross-entropy of the next token; the phases are named after that update."""

    def phase(name: str) -> AbstractContextManager[Any]:
        return recorder.phase(f"{update}.{name}")

    if plan.loss != "full":
        return -token_logprobs(roles.policy, batch, 1, plan.loss, phase).mean()
    with phase("forward"):
        logits = roles.policy(**inputs(roles.policy, batch)).logits.view(*batch.ids.shape, -1)
    with phase("loss"):  # the 16-bit logits stay alive, as they do inside transformers' forward
        narrow = plan.recipe == "hf-4.48" and plan.model.model_type == "gpt_bigcode"
        return causal_lm_loss(logits, batch.ids, plan.recipe, narrow)
