"""Plan: its defaults, and every contradiction with a message and a way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.plan import KNOBS, METHODS, Plan

LLAMA = catalog.find_model("llama-3.1-8b")
SMALL = catalog.find_model("HuggingFaceTB/SmolLM-135M")  # reads 2,048 tokens
GPUS = {name: catalog.find_gpu(name) for name in ("4090", "t4", "m3 max 64")}


def plan(**fields: Any) -> Plan:
    gpu = GPUS[fields.pop("gpu", "4090")]
    return Plan(**{"model": LLAMA, "gpu": gpu, **fields})


# --- defaults ---


@pytest.mark.parametrize("method", METHODS)
def test_every_knob_a_method_does_not_use_is_none(method: str) -> None:
    made = plan(method=method)
    for name, knob in KNOBS.items():
        if method not in knob["methods"]:
            assert getattr(made, name) is None, name


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"precision": "bf16-mixed", "reference": "copy", "padding": "padded"}),
        ({"tuning": "lora"}, {"precision": "bf16-autocast", "reference": "adapter"}),
        ({"batch": 64}, {"minibatch": 64, "micro_batch": 1, "score_batch": 1}),
        ({"batch": 8, "micro_batch": 4}, {"score_batch": 4}),
        ({"tuning": "qlora"}, {"critic_tuning": "qlora", "adapter_precision": "fp32"}),
        ({"critic_tuning": "lora"}, {"lora_rank": 16, "reference": "copy"}),
        ({"critic": "shared"}, {"critic_tuning": None}),
        ({"reward_model": "rule"}, {"reward_precision": None, "critic": "reward"}),
        ({"reward_model": "adapter", "tuning": "lora"}, {"critic": "adapter"}),
        ({"rollout": "vllm"}, {"rollout_memory": 0.3, "rollout_sleep": False}),
        ({"method": "grpo"}, {"epochs": 1, "group": 8, "critic": None}),
        ({"method": "sft"}, {"padding": "none", "sequence": 2048, "reference": None}),
        ({"method": "reward"}, {"loss": None, "score_batch": None, "padding": "padded"}),
        ({"method": "dpo", "reference": "precomputed"}, {"score_batch": None}),
        ({"method": "inference"}, {"precision": "bf16", "quant": "bf16", "tuning": None}),
        ({"method": "inference", "quant": "fp32"}, {"precision": "fp32"}),
        ({"method": "inference", "quant": "q4_k_m"}, {"precision": "bf16"}),
    ],
    ids=str,
)  # fmt: skip
def test_defaults(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    made = plan(**fields)
    assert {name: getattr(made, name) for name in expected} == expected


def test_types_by_precision() -> None:
    found = {}
    for precision in KNOBS["precision"]["choices"]:
        made = plan(precision=precision)
        found[precision] = (made.weight_dtype, made.compute_dtype, made.autocast)
    assert found == {
        "bf16": ("bf16", "bf16", False),
        "fp16": ("fp16", "fp16", False),
        "fp32": ("fp32", "fp32", False),
        "bf16-mixed": ("fp32", "bf16", True),
        "fp16-mixed": ("fp32", "fp16", True),
        "bf16-autocast": ("bf16", "bf16", True),
        "bf16-master": ("bf16", "bf16", False),
    }


def test_architectures_of_reward_and_critic() -> None:
    assert plan().reward_architecture is plan().critic_architecture is LLAMA
    small = plan(reward_model=SMALL, prompt=100)
    assert small.reward_architecture is small.critic_architecture is SMALL
    rule = plan(reward_model="rule")
    assert rule.reward_architecture is None
    assert rule.critic_architecture is LLAMA
    shared = plan(critic="shared")
    assert shared.critic_architecture is None


def test_change_keeps_what_was_said_and_forgets_what_has_no_use() -> None:
    lora = plan(tuning="lora", lora_rank=64, batch=32, rollout="vllm", rollout_memory=0.5)
    full = lora.change(tuning="full")
    assert (full.batch, full.lora_rank, full.precision) == (32, None, "bf16-mixed")
    assert full.rollout_memory == 0.5
    assert full.change(rollout="transformers").rollout_memory is None
    assert lora.change(method="sft").batch == 32
    assert lora.change(method="inference").context == 4096
    assert lora.change(lora_rank=None).lora_rank == 16
    assert lora.change(gpu=GPUS["t4"]).memory == GPUS["t4"].usable_memory()
    with pytest.raises(FitCheckError, match="--rollout-memory has no meaning in this plan"):
        lora.change(rollout="transformers", rollout_memory=0.4)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().batch = 4  # type: ignore[misc]


# --- what is wrong: (fields, part of the message, part of the hint) ---

NUMBERS: list[tuple[Any, ...]] = [
    (name, value)
    for name in ("batch", "micro_batch", "prompt", "epochs")
    for value in (0, -3, 10**12, 2.5, "8", True, float("nan"), 10**99)
]


@pytest.mark.parametrize(("name", "value"), NUMBERS, ids=str)
def test_absurd_numbers(name: str, value: object) -> None:
    with pytest.raises(FitCheckError) as raised:
        plan(**{name: value})
    assert raised.value.message == f"--{name.replace('_', '-')} cannot be {value!r}"
    assert raised.value.hint == "a whole number from 1 to 100,000,000"


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    # unknown choices
    ({"method": "rlhf"}, "--method cannot be 'rlhf'", "ppo, inference, sft"),
    ({"tuning": "dora"}, "--tuning cannot be 'dora'", "full, lora, qlora"),
    ({"precision": "int4"}, "--precision cannot be 'int4'", "bf16-mixed"),
    ({"optimizer": ["adamw"]}, "--optimizer cannot be ['adamw']", "adamw-fused"),
    ({"checkpointing": "on"}, "--checkpointing cannot be 'on'", "on, off"),
    ({"checkpointing": 1}, "--checkpointing cannot be 1", "on, off"),
    ({"reward_model": "gpt-4"}, "--reward-model cannot be 'gpt-4'", "a model of the catalog"),
    ({"sharding": "zero4"}, "--sharding cannot be 'zero4'", "zero3"),
    ({"offload": ("policy",)}, "--offload cannot be 'policy'", "reference, reward, critic"),
    ({"offload": "reward"}, "--offload cannot be 'reward'", "reference, reward, critic"),
    # a knob the method does not use
    ({"method": "sft", "reference": "copy"}, "--reference has no meaning for sft", "ppo, grpo"),
    ({"method": "sft", "score_batch": 2}, "--score-batch has no meaning for sft", "ppo, grpo, dpo"),
    ({"method": "reward", "loss": "fused"}, "--loss has no meaning for reward", "ppo, sft"),
    ({"method": "inference", "batch": 2}, "--batch has no meaning for inference", "ppo, sft"),
    ({"method": "sft", "context": 9}, "--context has no meaning for sft", "inference"),
    ({"method": "ppo", "group": 4}, "--group has no meaning for ppo", "grpo"),
    # a knob that this plan has no use for
    ({"lora_rank": 8}, "--lora-rank has no meaning", "--tuning lora"),
    ({"lora_targets": "attention"}, "--lora-targets has no meaning", "--tuning lora"),
    ({"rollout_memory": 0.5}, "--rollout-memory has no meaning", "--rollout vllm"),
    ({"rollout_sleep": True}, "--rollout-sleep has no meaning", "--rollout vllm"),
    ({"reward_model": "rule", "reward_precision": "nf4"}, "--reward-precision", "--reward-model"),
    ({"critic": "shared", "critic_tuning": "lora"}, "--critic-tuning has", "--critic"),
    (
        {"method": "dpo", "reference": "precomputed", "score_batch": 1},
        "--score-batch has no meaning",
        "precomputed",
    ),
    # sizes
    ({"batch": 8, "micro_batch": 3}, "--micro-batch 3 does not divide --minibatch 8", "divides"),
    ({"batch": 8, "minibatch": 16}, "--minibatch 16 does not divide --batch 8", "divides"),
    ({"batch": 8, "score_batch": 16}, "--score-batch 16 does not divide --batch 8", "divides"),
    ({"method": "grpo", "batch": 12}, "--group 8 does not divide --batch 12", "divides"),
    ({"method": "sft", "batch": 9, "micro_batch": 2}, "--micro-batch 2 does not divide", "divides"),
    (
        {"method": "dpo", "batch": 4, "micro_batch": 2, "score_batch": 4},
        "--score-batch 4 does not divide --micro-batch 2",
        "divides",
    ),
    ({"prompt": 100_000, "response": 50_000}, "150,000 tokens are more than", "--prompt"),
    ({"method": "sft", "sequence": 200_000}, "200,000 tokens are more than", "--sequence"),
    ({"method": "inference", "context": 200_000}, "200,000 tokens are more than", "--context"),
    ({"reward_model": SMALL, "prompt": 2000}, "2,512 tokens are more", "--reward-model"),
    ({"critic": SMALL, "prompt": 2000}, "2,512 tokens are more than the 2,048", "--critic"),
    ({"ptx_batch": -1}, "--ptx-batch cannot be -1", "from 0"),
    # references
    ({"reference": "adapter"}, "--reference adapter needs an adapter", "--reference copy"),
    ({"reference": "precomputed"}, "--reference precomputed is for dpo", "--reference copy"),
    ({"method": "grpo", "reference": "precomputed"}, "--reference precomputed is for", "copy"),
    ({"method": "dpo", "reference": "none"}, "dpo compares with a reference", "precomputed"),
    # what sits on a frozen base
    ({"reward_model": "adapter"}, "--reward-model adapter needs a frozen base", "--tuning lora"),
    ({"critic": "adapter"}, "--critic adapter needs a frozen base", "--tuning lora"),
    # adapters
    ({"tuning": "lora", "precision": "bf16-master"}, "adapters need none", "bf16-autocast"),
    ({"tuning": "lora", "lora_rank": 5000}, "--lora-rank 5,000 is more than the width", "8 to 256"),
    (
        {"tuning": "lora", "lora_targets": ("c_attn",)},
        "no linear layer of meta-llama/Llama-3.1-8B is called 'c_attn'",
        "down_proj, gate_proj, k_proj",
    ),
    ({"tuning": "lora", "lora_targets": ("q_proj", "v_porj")}, "is called 'v_porj'", "v_proj"),
    ({"tuning": "lora", "lora_targets": ()}, "--lora-targets cannot be ()", "all-linear"),
    ({"tuning": "lora", "lora_targets": ("",)}, "--lora-targets cannot be ('',)", "all-linear"),
    ({"tuning": "lora", "lora_targets": "q_proj"}, "--lora-targets cannot be 'q_proj'", "by comma"),
    # kernels
    ({"padding": "packed"}, "--padding packed needs an attention kernel", "--attention flash"),
    ({"attention": "flash", "precision": "fp32"}, "--attention flash computes in 16 bits", "sdpa"),
    ({"attention": "flash", "gpu": "t4"}, "--attention flash does not run on Tesla T4", "sdpa"),
    ({"attention": "flash", "gpu": "m3 max 64"}, "--attention flash does not run on Apple", "sdpa"),
    # inference
    ({"method": "inference", "precision": "bf16-mixed"}, "--precision cannot be", "fp16"),
    (
        {"method": "inference", "quant": "fp32", "precision": "bf16"},
        "--quant fp32 weights are multiplied as they are, not in bf16",
        "--precision fp32",
    ),
    # offload
    ({"reward_model": "rule", "offload": ("reward",)}, "keeps no reward of its own", "out"),
    ({"tuning": "lora", "offload": ("reference",)}, "keeps no reference of its own", "out"),
    ({"method": "sft", "offload": ("critic",)}, "keeps no critic of its own", "out"),
    ({"offload": ("optimizer",), "optimizer": "lion"}, "runs Adam on the CPU, not lion", "adamw"),
    # engines
    ({"rollout": "vllm", "rollout_memory": 1.5}, "--rollout-memory cannot be 1.5", "0.3"),
    ({"rollout": "vllm", "rollout_memory": float("nan")}, "--rollout-memory cannot be nan", "0.3"),
    ({"rollout": "vllm", "rollout_memory": "0.5"}, "--rollout-memory cannot be '0.5'", "0.3"),
    # hardware
    ({"nodes": 8}, "more than one machine is not modelled", "--nodes 1"),
    ({"sharding": "zero3"}, "--sharding zero3 shares work among cards", "--gpus 2"),
    ({"gpus": 2, "sharding": "none"}, "--sharding none leaves 1 of the 2 cards", "ddp"),
    ({"gpus": 3}, "--micro-batch 1 on each of 3 cards does not divide", "sizes"),
    ({"gpus": 2, "sharding": "zero2", "optimizer": "muon"}, "needs whole matrices", "ddp"),
    (
        {"gpus": 2, "sharding": "fsdp", "precision": "bf16-master"},
        "--precision bf16-master is DeepSpeed's",
        "bf16-mixed",
    ),
    (
        {"gpus": 2, "sharding": "fsdp", "method": "inference"},
        "needs tensor parallelism",
        "--sharding ddp",
    ),
    ({"gpus": 0}, "--gpus cannot be 0", "whole number"),
    ({"gpus": True}, "--gpus cannot be True", "whole number"),
    ({"ram": 0}, "--ram cannot be 0", "whole number"),
    ({"ram": -(2**33)}, "--ram cannot be", "whole number"),
    ({"ram": 64}, "--ram 64 is in bytes", "64gib"),
    ({"ram": 2**60}, "--ram cannot be", "whole number"),
    ({"ram": "64gib"}, "--ram cannot be '64gib'", "whole number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message", "hint"), CONTRADICTIONS, ids=[str(row[0]) for row in CONTRADICTIONS]
)
def test_contradictions(fields: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(FitCheckError) as raised:
        plan(**fields)
    assert message in raised.value.message
    assert hint in raised.value.hint
    assert len(raised.value.message) < 160


def test_targets_may_be_those_of_the_critic_alone() -> None:
    """But every model that has adapters must have one somewhere."""
    neox = catalog.find_model("EleutherAI/pythia-1b")
    both = ("q_proj", "query_key_value")
    made = plan(tuning="lora", critic=neox, lora_targets=both)
    assert made.lora_targets == both
    with pytest.raises(FitCheckError, match="no linear layer of EleutherAI/pythia-1b is called"):
        plan(tuning="lora", critic=neox, lora_targets=("q_proj",))
    assert plan(tuning="lora", critic=neox, critic_tuning="full", lora_targets=("q_proj",))
    assert plan(critic=neox, critic_tuning="lora", lora_targets=("dense",)).lora_rank == 16


def test_what_is_allowed_stays_allowed() -> None:
    assert plan(offload=("reference", "reward", "critic", "optimizer"))
    assert plan(offload=()).offload == ()
    assert plan(ptx_batch=0).ptx_batch == 0
    assert plan(tuning="lora", reference="copy", offload=("reference",))
    assert plan(padding="packed", attention="flash")
    assert plan(method="inference", context=131_072)
    assert plan(ram=2**36).ram == 2**36


def test_json_has_every_field_and_only_plain_values() -> None:
    values = plan(tuning="lora", lora_targets=("q_proj",), reward_model=SMALL, prompt=9).to_json()
    fields = {f.name for f in dataclasses.fields(Plan)} - {"given"}
    assert values.keys() == fields
    assert values["model"] == LLAMA.id
    assert values["gpu"] == GPUS["4090"].id
    assert values["reward_model"] == SMALL.id
    assert values["lora_targets"] == ["q_proj"]
    assert values["memory"]["total_bytes"] == GPUS["4090"].total_bytes


def test_every_knob_is_documented() -> None:
    for name, knob in KNOBS.items():
        assert knob["doc"], name
        assert knob["methods"], name
        assert knob["kind"] in ("choice", "int", "flag", "share", "model", "list"), name
        assert (knob["kind"] in ("choice", "model", "list")) == bool(knob["choices"]), name
