"""Estimate against dry run: how far apart the two are, phase by phase, on models cut short.

A model keeps its widths and loses layers, so that its real step is traced in a second or two. Both
rungs see the same short model; what a layer costs and what stands beside the layers is whole.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from fitcheck import fit
from fitcheck.bench.configs import config_from
from fitcheck.bench.dryrun import dry_run
from fitcheck.catalog import find_gpu, find_model
from fitcheck.model import Model
from fitcheck.plan import Plan
from fitcheck.report import ALLOCATED, Report
from fitcheck.weights import weights

CARD = "NVIDIA A100-SXM4-80GB"
# What a plan of each method is given, twice: few long sequences, and many short ones.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": (
        {"sequence": 1024, "batch": 2, "micro_batch": 1},
        {"sequence": 256, "batch": 8, "micro_batch": 4},
    ),
    "reward": (
        {"sequence": 1024, "batch": 2, "micro_batch": 1},
        {"sequence": 256, "batch": 8, "micro_batch": 4},
    ),
    "dpo": (
        {"sequence": 768, "batch": 2, "micro_batch": 1},
        {"sequence": 256, "batch": 8, "micro_batch": 4},
    ),
    "grpo": (
        {"prompt": 512, "response": 128, "batch": 4, "group": 4, "micro_batch": 1},
        {"prompt": 128, "response": 64, "batch": 16, "group": 8, "micro_batch": 4},
    ),
    "ppo": (
        {"prompt": 512, "response": 128, "batch": 4, "micro_batch": 1, "epochs": 1},
        {"prompt": 128, "response": 64, "batch": 16, "micro_batch": 4, "epochs": 2},
    ),
}
# (tuning, precision, checkpointing): both precision families of each tuning.
REGIMES = [
    *(("full", "bf16-mixed", True), ("lora", "bf16-autocast", False), ("qlora", "bf16", True)),
    *(("full", "bf16", False), ("lora", "bf16", True), ("qlora", "bf16-autocast", False)),
    *(("full", "bf16-mixed", False), ("lora", "bf16-autocast", True), ("qlora", "bf16", False)),
    *(("full", "bf16", True), ("lora", "bf16", False), ("qlora", "bf16-autocast", True)),
]


class Agreement(NamedTuple):
    """Peak allocated bytes by estimate and dry run: of the whole step, and of each phase."""

    plan: Plan
    peak: tuple[int, int]
    phases: dict[str, tuple[int, int]]

    @property
    def error(self) -> float:
        """Of the estimate, relative to the dry run."""
        return self.peak[0] / self.peak[1] - 1

    @property
    def worst(self) -> tuple[str, float]:
        """The phase that is furthest off."""
        errors = {name: a / b - 1 for name, (a, b) in self.phases.items()}
        return max(errors.items(), key=lambda item: abs(item[1]))


@lru_cache(maxsize=256)
def shortened(name: str, layers: int) -> Model:
    """A model of the catalog with fewer layers, and the parameters and caches it then has."""
    model = find_model(name)
    moe = model.moe
    dense = 1 if moe is not None and (moe.dense_layers or moe.first_k_dense) else 0
    if moe is not None:
        first = dense if moe.first_k_dense else moe.first_k_dense
        moe = moe._replace(moe_layers=layers - dense, dense_layers=dense, first_k_dense=first)
    cut = replace(model, num_layers=layers, layer_type_counts=None, moe=moe, params=0)
    config = config_from(cut)
    with torch.device("meta"):
        params = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    kinds = Counter(getattr(config, "layer_types", None) or ["all"])
    groups = model.kv_cache_groups or ()
    counted = [layers] if len(groups) == 1 else [kinds[group.kind] for group in groups]
    cut = replace(
        cut,
        params=params,
        kv_cache_groups=tuple(g._replace(layers=n) for g, n in zip(groups, counted, strict=True)),
        layer_type_counts=dict(kinds) if len(groups) > 1 else None,
    )
    assert sum(weight.params for weight in weights(cut)) == params
    return cut


def plan_of(name: str, layers: int, knobs: dict[str, Any]) -> Plan:
    """The plan of a model on an A100, shortened to so many layers; 0: the whole of it."""
    model = shortened(name, layers) if layers else find_model(name)
    return Plan(model=model, gpu=find_gpu(CARD), **knobs)


def _allocated(report: Report) -> dict[str, int]:
    return {p.name: max(m.part(ALLOCATED) for m in p.moments) for p in report.phases}


def agreement(plan: Plan) -> Agreement:
    """Both rungs of one plan."""
    guessed, traced = fit(plan), dry_run(plan)[0]
    ours, theirs = _allocated(guessed), _allocated(traced)
    assert list(ours) == list(theirs), json.dumps([list(ours), list(theirs)])
    pairs = {name: (ours[name], theirs[name]) for name in ours}
    return Agreement(plan, (guessed.allocated_bytes, traced.allocated_bytes), pairs)
