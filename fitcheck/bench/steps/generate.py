"""The rollout: prompts in, sampled responses out, with a growing key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import Batch, cache_argument, positions, takes_positions


@torch.no_grad()
def generate(roles: Roles, prompts: Batch, response: int, recorder: Recorder) -> Tensor:
    """Sampled ids [rows, response]; all rows together, each to its full length.

    One autocast region spans the rollout, so 16-bit copies of fp32 weights are made once.
    """
    policy: Any = roles.policy.eval()
    rows, prompt = prompts.ids.shape
    ids = prompts.ids.new_empty(rows, response)
    mask = prompts.mask
    with roles.autocast():
        with recorder.phase("rollout.prefill"):
            cache = DynamicCache(config=policy.config)
            ids[:, :1] = next_token(policy, prompts.ids, mask, cache)
        with recorder.phase("rollout.decode"):
            for t in recorder.decode(range(1, response)):
                if mask is not None:
                    mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
                ids[:, t : t + 1] = next_token(policy, ids[:, t - 1 : t], mask, cache)
            del cache
    return ids


def next_token(policy: Any, ids: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
    """One sampled token behind each row [rows, 1]; the cache takes in the keys and values."""
    arguments: dict[str, Any] = {"attention_mask": mask, cache_argument(policy): cache}
    if mask is not None and takes_positions(policy):
        arguments["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    logits = policy(ids, use_cache=True, logits_to_keep=1, **arguments).logits[:, -1]
    probabilities = torch.softmax(logits.float(), dim=-1)
    return torch.multinomial(probabilities, num_samples=1)
