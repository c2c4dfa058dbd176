"""The plans that are held against TRL's own trainers: by record_trl.py and test_trl.py."""

from __future__ import annotations

from typing import Any

from fitcheck import resolve
from fitcheck.plan import Plan

QWEN_05, QWEN_15, QWEN3 = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-1.7B"
LLAMA_1, LLAMA_3, LLAMA_8 = (
    *("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"),
    "meta-llama/Llama-3.1-8B",
)
MISTRAL = "mistralai/Mistral-7B-v0.1"
AUTOCAST = {"precision": "bf16-autocast"}

_PPO: list[dict[str, Any]] = [
    {"model": QWEN_05, "prompt": 128, "micro_batch": 4, "batch": 8},
    {"model": QWEN_05, "precision": "bf16", "batch": 16, "response": 120, "epochs": 2},
    {"model": LLAMA_1},
    {"model": LLAMA_1, "precision": "bf16", "tuning": "lora", "batch": 16, "micro_batch": 4},
    {"model": QWEN_15, "precision": "bf16", "prompt": 256, "response": 128, "batch": 16}
    | {"micro_batch": 2, "score_batch": 4},
    {"model": QWEN_15, "tuning": "lora", "prompt": 128, "batch": 4, "micro_batch": 1},
    {"model": LLAMA_8, "precision": "bf16", "response": 128, "batch": 8, "micro_batch": 1},
    {"model": LLAMA_8, "precision": "bf16", "tuning": "lora", "batch": 8, "micro_batch": 2},
    {"model": QWEN_05, "precision": "bf16", "batch": 64, "response": 256, "micro_batch": 1}
    | {"prompt": 64, "epochs": 1},
    {"model": LLAMA_8, "precision": "bf16", "reward_model": LLAMA_1, "micro_batch": 2},
    {"model": LLAMA_3, "precision": "bf16", "batch": 8, "minibatch": 4, "micro_batch": 2},
    {"model": QWEN3, "precision": "bf16", "micro_batch": 4},
    {"model": MISTRAL, "precision": "bf16", "micro_batch": 2, "response": 100},
    {"model": LLAMA_1, "precision": "bf16-autocast", "checkpointing": True},
]
_SFT: list[dict[str, Any]] = [
    {"model": QWEN_05},
    {"model": LLAMA_1, "tuning": "lora"},
    {"model": QWEN_15, "precision": "bf16", "batch": 8, "micro_batch": 4},
    {"model": LLAMA_8, "micro_batch": 1, "sequence": 2048},
    {"model": LLAMA_8, **AUTOCAST, "tuning": "lora", "micro_batch": 2, "batch": 4},
]
_DPO: list[dict[str, Any]] = [
    {"model": QWEN_05, "micro_batch": 2},
    {"model": LLAMA_1, **AUTOCAST, "tuning": "lora", "micro_batch": 4, "batch": 8},
    {"model": QWEN_15, "checkpointing": False, "micro_batch": 1, "batch": 2},
    {"model": LLAMA_8, **AUTOCAST, "tuning": "lora", "micro_batch": 1},
    {"model": LLAMA_3, "precision": "bf16", "micro_batch": 2},
]
_REWARD: list[dict[str, Any]] = [
    {"model": QWEN_05, "micro_batch": 2},
    {"model": LLAMA_1, "tuning": "lora", "micro_batch": 2, "batch": 4},
    {"model": LLAMA_8, **AUTOCAST, "micro_batch": 1},
]
_GRPO: list[dict[str, Any]] = [
    {"model": QWEN_05, "prompt": 128, "response": 128},
    {"model": QWEN_15, "reference": "copy", "prompt": 128, "response": 128, "batch": 16},
    {"model": LLAMA_1, "tuning": "lora", "checkpointing": False, "prompt": 128, "response": 64}
    | {"micro_batch": 4, "batch": 8},
    {"model": LLAMA_8, **AUTOCAST, "tuning": "lora", "prompt": 128, "response": 128}
    | {"batch": 16, "epochs": 2, "reference": "adapter"},
]
PLANS: list[dict[str, Any]] = [
    {"method": method, **knobs}
    for method, plans in (
        *(("ppo", _PPO), ("sft", _SFT), ("dpo", _DPO), ("reward", _REWARD), ("grpo", _GRPO)),
    )
    for knobs in plans
]


# Small ones that a CPU runs whole. There no mask is made for rows without padding.
_SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_layers": 2}
_SMALL_BATCH = {
    "prompt": 24,
    "response": 8,
    "epochs": 1,
    "batch": 8,
    "micro_batch": 4,
    "padding": "none",
}
_TEXT = {"precision": "fp32", "sequence": 64, "padding": "none"}
TINY: list[dict[str, Any]] = [
    {"method": "ppo", **_SMALL_BATCH},
    {"method": "ppo", **_SMALL_BATCH, "batch": 16, "score_batch": 8, "minibatch": 8},
    {"method": "ppo", **_SMALL_BATCH, "tuning": "lora", "lora_rank": 8},
    {"method": "ppo", **_SMALL_BATCH, "padding": "padded"},
    {"method": "sft", **_TEXT, "micro_batch": 4},
    {"method": "sft", **_TEXT, "micro_batch": 4, "checkpointing": False, "tuning": "lora"},
    {"method": "dpo", **_TEXT, "micro_batch": 2, "batch": 4},
    {"method": "reward", **_TEXT, "micro_batch": 2},
]


def tiny_plan_of(knobs: dict[str, Any]) -> Plan:
    """One of TINY: a Llama of two layers."""
    from tiny import CARD, tiny_model

    vocabulary = 4096 if knobs["method"] == "ppo" else 64  # PPO keeps scores of all of it
    inner = {"intermediate_size": 1024, "num_key_value_heads": 4, "vocab_size": vocabulary}
    model = tiny_model("meta-llama/Llama-3.2-3B", **_SHAPE, **inner)
    return Plan(model=model, gpu=CARD, recipe="trl", **knobs)


def plan_of(knobs: dict[str, Any]) -> Plan:
    """One of PLANS, for an A100 of 80 GB."""
    fields = {"gpu": "NVIDIA A100-SXM4-80GB", "recipe": "trl", **knobs}
    return resolve(fields.pop("model"), **fields)
