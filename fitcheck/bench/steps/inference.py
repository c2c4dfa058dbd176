"""Serving with transformers at its fullest: every sequence as long as the context allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.batches import random_batch
from fitcheck.bench.steps.generate import next_token
from fitcheck.plan import Plan


@torch.no_grad()
def inference(plan: Plan, roles: Roles, recorder: Recorder) -> dict[str, Tensor]:
    """One sequence is read while all others are cached; then each of them writes its last token."""
    policy: Any = roles.policy.eval()
    prompt = random_batch(plan, 1, max(1, plan.context - 1), roles.device).ids
    others: DynamicCache | None = None
    with recorder.phase("prefill"):
        if plan.concurrency > 1:
            others = _read(policy, prompt)[0]
            others.batch_repeat_interleave(plan.concurrency - 1)
        cache, token = _read(policy, prompt)
    with recorder.phase("decode"):
        if others is not None:
            _move(cache, others)
            cache = others
        next_token(policy, token.repeat(plan.concurrency, 1), None, cache)
        del cache, others
    return {}


def _read(policy: Any, prompt: Tensor) -> tuple[DynamicCache, Tensor]:
    """The cache of a prompt, and the token behind it."""
    cache = DynamicCache(config=policy.config)
    token = next_token(policy, prompt, None, cache)
    return cache, token


def _move(source: DynamicCache, target: DynamicCache) -> None:
    """Put the rows of one cache behind those of another, layer by layer."""
    for theirs, ours in zip(source.layers, target.layers, strict=True):
        if theirs.is_initialized:
            ours.keys = torch.cat([ours.keys, theirs.keys])
            ours.values = torch.cat([ours.values, theirs.values])
            theirs.keys = theirs.values = None
