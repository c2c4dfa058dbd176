"""Tiny models and plans on which the real steps run in a fraction of a second, on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from fitcheck.bench.configs import config_from
from fitcheck.bench.roles import Roles, build
from fitcheck.catalog import find_model
from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.plan import Plan

CPU, META = torch.device("cpu"), torch.device("meta")
LLAMA = "meta-llama/Llama-3.2-1B"
CARD = GPU(
    **{"id": "test/card", "name": "card", "vendor": "nvidia", "arch": "ampere", "segment": "test"},
    **{"memory_gib": 80, "total_bytes": 80 << 30, "total_verified": True},
    **{"sources": ("none",), "checked": "2026-11", "compute_capability": (8, 0)},
)


def tiny_model(name: str = LLAMA, **sizes: Any) -> Model:
    """A catalog model's architecture with two small layers, and the parameters it then has."""
    model = find_model(name)
    heads = 4 if model.num_key_value_heads == model.num_attention_heads else 2
    shape: dict[str, Any] = {
        **{"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 48},
        **{"num_attention_heads": 4, "num_key_value_heads": heads, "head_dim": 16},
        **{"max_position_embeddings": 256, "layer_type_counts": None},
        **sizes,
    }
    if model.moe is not None:
        small = {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 32}
        shape["moe"] = model.moe._replace(**small)
    model = replace(
        model, **shape, params_embedding=shape["vocab_size"] * shape["hidden_size"], params=0
    )
    with META:
        module = AutoModelForCausalLM.from_config(config_from(model))
    return replace(model, params=sum(p.numel() for p in module.parameters()))


def tiny_plan(method: str, model: Model | None = None, **knobs: Any) -> Plan:
    """A plan of a few tokens."""
    tokens: dict[str, Any] = {"sequence": 10}
    if method in ("ppo", "grpo"):
        tokens = {"prompt": 6, "response": 4, "epochs": 1}
    if method == "grpo":
        tokens["group"] = 2
    sizes = {"batch": 4, "micro_batch": 2}
    return Plan(
        model=model or tiny_model(), gpu=CARD, method=method, **{**sizes, **tokens, **knobs}
    )


def built(plan: Plan, device: torch.device = CPU, seed: int = 0) -> Roles:
    """The plan's roles with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return build(plan, device)


class MasksArePadded(TorchDispatchMode):
    """Answers what transformers asks of masks on meta: with False, there is padding."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # much faster

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))
