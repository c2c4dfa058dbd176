"""A rollout by transformers' `generate`, as TRL's trainers call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, cache_argument, positions, takes_positions
from fitcheck.plan import Plan


@torch.no_grad()
def generate(
    plan: Plan, roles: Roles, prompts: Batch, recorder: Recorder, temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sampled ids [rows, response]; with a temperature also its scores [rows, response, V] in fp32.

    Otherwise the scores are empty. One step's logits and probabilities stay until the next replace
    them, and the cache until the scores are stacked (generation/utils.py, _sample).
    """
    rows, prompt = prompts.ids.shape
    ids, mask = prompts.ids.new_empty(rows, plan.response), prompts.mask
    cache = DynamicCache(config=roles.policy.config)
    found: list[Tensor] = []
    with recorder.phase("rollout.prefill"):
        logits = _last_logits(roles, prompts.ids, mask, cache)
        scores, probabilities = _sampled(logits, temperature, found, ids[:, :1])
    with recorder.phase("rollout.decode"):
        for t in recorder.decode(range(1, plan.response)):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            logits = _last_logits(roles, ids[:, t - 1 : t], mask, cache)
            scores, probabilities = _sampled(logits, temperature, found, ids[:, t : t + 1])
    if temperature is None:
        return ids, ids.new_empty(0)
    del logits, probabilities
    with recorder.phase("rollout.scores"):
        stacked = scores.new_empty(rows, plan.response, scores.shape[-1])
        for t, each in enumerate(found):  # a dry run has only the first few at hand
            stacked[:, t] = each
    return ids, stacked


def _last_logits(roles: Roles, ids: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
    """Logits of the last position [rows, V] in fp32; each call is an autocast region of its own."""
    policy: Any = roles.policy
    arguments: dict[str, Any] = {"attention_mask": mask, cache_argument(policy): cache}
    if mask is not None and takes_positions(policy):
        arguments["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    with roles.autocast():
        logits = policy(ids, use_cache=True, logits_to_keep=1, **arguments).logits
    return logits[:, -1].to(torch.float32, copy=True)  # type: ignore[no-any-return]


def _sampled(
    logits: Tensor, temperature: float | None, found: list[Tensor], ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw the next ids; the scores they are drawn from, which `found` keeps, and the softmax."""
    scores = logits
    if temperature is not None:
        scores = logits / temperature
        found.append(scores)
    probabilities = torch.softmax(scores, dim=-1)
    ids[:] = torch.multinomial(probabilities, num_samples=1)
    return scores, probabilities
