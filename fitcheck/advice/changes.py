"""The changes that can lower a plan's memory, and what each costs its user, in words.

RANKS: "result unchanged" computes the same update to rounding; "precision" keeps the method and
stores or multiplies in fewer bits; "method" trains something else, or less. To offer a change, add
it to the function of its rank, after the changes that cost the user less.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isqrt
from typing import Any, NamedTuple

from fitcheck import catalog
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.model import Model
from fitcheck.plan import GGUF_QUANTS, KNOBS, ROLLOUT, Plan

RANKS = ("result unchanged", "precision", "method")
Level = dict[str, Any]


class Change(NamedTuple):
    """One change; levels: fields with their new values, the mildest first."""

    rank: str
    effect: str
    levels: tuple[Level, ...]


def changes(plan: Plan) -> list[Change]:
    """Every change that the plan admits, those that cost the user least first."""
    found = []
    for rank, offered in zip(RANKS, (_unchanged, _precision, _method), strict=True):
        for effect, levels in offered(plan):
            if valid := tuple(level for level in levels if _valid(plan, level)):
                found.append(Change(rank, effect, valid))
    return found


def changed(plan: Plan, levels: list[Level]) -> Plan:
    """The plan with all of these applied; FitCheckError when they contradict each other."""
    together: Level = {}
    for level in levels:
        for name, value in level.items():
            if name == "offload":
                value = tuple(dict.fromkeys((*together.get(name, ()), *value)))
            together[name] = value
    return plan.change(**together) if together else plan


def _valid(plan: Plan, level: Level) -> bool:
    """Whether the rules of a plan allow it: their refusal is the answer, not a fault."""
    try:
        plan.change(**level)
    except FitCheckError:
        return False
    return True


Offers = Iterator[tuple[str, list[Level]]]


def one(field: str, *values: Any) -> list[Level]:
    """The levels of a change to one field."""
    return [{field: value} for value in values]


def _unchanged(plan: Plan) -> Offers:
    if plan.method == "inference":
        return
    if plan.optimizer == "adamw":
        effect = "the same steps in one kernel, without a parameter-sized temporary"
        yield effect, one("optimizer", "adamw-fused")
    if plan.loss in ("full", "chunked"):
        if plan.loss == "full":
            yield "logits of 256 tokens at a time", one("loss", "chunked")
        yield "logits in tiles, never whole; needs such a kernel", one("loss", "fused")
    if plan.gpus > 1:
        ways = KNOBS["sharding"]["choices"]
        effect = "the cards share optimizer states, then gradients, then weights"
        yield effect, one("sharding", *ways[ways.index(plan.sharding) + 1 :])
    if plan.attention == "eager":
        yield "the same attention without its table of scores", one("attention", "sdpa")
    yield "needs flash-attn installed", one("attention", "flash")
    if plan.rollout in ("vllm", "sglang") and not plan.rollout_sleep:
        yield "the engine wakes and sleeps in every step", one("rollout_sleep", True)
    if plan.score_batch and plan.score_batch > 1:
        effect = "fewer sequences in a scoring pass: more passes"
        yield effect, one("score_batch", *divisors(plan.score_batch))
    if not plan.checkpointing:
        effect = "each layer's forward runs twice: up to a third more compute in the update"
        yield effect, one("checkpointing", True)
    if plan.micro_batch > 1:
        effect = "the same batch in more, smaller passes"
        yield effect, one("micro_batch", *divisors(plan.micro_batch))
    if plan.method == "dpo":
        effect = "the reference's log-probs are computed once, before training"
        yield effect, one("reference", "precomputed")
    if plan.rollout in ("vllm", "sglang"):
        yield "slower generation, no second copy of the weights", one("rollout", "transformers")
    for part in ("reference", "reward", "critic"):
        if part not in plan.offload:
            effect = f"the {part} waits in RAM and crosses the bus in every step"
            yield effect, one("offload", (*plan.offload, part))
    if "optimizer" not in plan.offload:
        effect = "Adam runs on the CPU: slow steps, states in RAM"
        yield effect, one("offload", (*plan.offload, "optimizer"))


def divisors(number: int) -> list[int]:
    """The smaller numbers that divide it, the largest first."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)} - {number}, reverse=True)


def _precision(plan: Plan) -> Offers:
    if plan.method == "inference":
        yield from _quantized(plan)
        return
    if plan.reward_precision:
        order = ("bf16", "int8", "nf4")
        smaller = order[order.index(plan.reward_precision) + 1 :]
        yield "rewards of a quantized model", one("reward_precision", *smaller)
    if plan.optimizer in ("adamw", "adamw-fused"):
        yield "8-bit states (bitsandbytes)", one("optimizer", "adamw-8bit")
        effect = "8-bit states that spill to RAM (bitsandbytes)"
        yield effect, one("optimizer", "paged-adamw-8bit")
    if plan.adapter_precision == "fp32":
        yield "adapters and their states in 16 bits", one("adapter_precision", "bf16")
    if plan.tuning == "lora":
        yield "the frozen base in 4 bits, dequantized in every pass", one("tuning", "qlora")
    if plan.critic_tuning == "lora" and plan.tuning != "lora":
        yield "the critic's frozen base in 4 bits", one("critic_tuning", "qlora")
    if plan.precision == "fp32":
        yield "16-bit products, fp32 weights", one("precision", "bf16-mixed")
    if plan.precision not in ("bf16", "fp16"):
        effect = "no fp32 weights or states: small updates are rounded away"
        if plan.tuning != "full":
            effect = "no autocast: sums and norms in 16 bits too"
        yield effect, one("precision", "bf16")


def _quantized(plan: Plan) -> Offers:
    order: tuple[str, ...] = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
    if plan.quant in ("bf16", "fp16", "fp32", "fp8", "int8"):
        smaller = ("nf4",) if plan.quant in ("fp8", "int8") else ("int8", "nf4")
        yield "fewer bits a weight (bitsandbytes)", one("quant", *smaller)
    if plan.quant in order:
        order = order[order.index(plan.quant) + 1 :]
    yield "fewer bits a weight (GGUF, llama.cpp)", one("quant", *order)
    if plan.kv_cache in ("bf16", "fp16"):
        middle = order.index("q4_k_m") if "q4_k_m" in order else -1  # below it the cache follows
        both = [(bits, "q8_0") for bits in order[: middle + 1]]
        both += [(bits, "q4_0") for bits in order[max(0, middle) :]]
        levels: list[Level] = [{"quant": bits, "kv_cache": cache} for bits, cache in both]
        yield "weights, keys and values in fewer bits (GGUF, llama.cpp)", levels
        types = ("q8_0", "q4_0") if plan.quant in GGUF_QUANTS[:-2] else ("fp8",)
        yield "keys and values in fewer bits", one("kv_cache", *types)
    elif plan.kv_cache == "q8_0":
        yield "keys and values in 4 bits", one("kv_cache", "q4_0")


def _method(plan: Plan) -> Offers:
    if plan.ptx_batch:
        yield "no pretraining text in the update", one("ptx_batch", 0)
    yield from _shorter(plan)
    if plan.method != "inference":
        yield from _trained(plan)
    yield from _roles(plan)
    yield "a smaller model of the same family", [{"model": m} for m in smaller_models(plan.model)]


def _shorter(plan: Plan) -> Offers:
    """Less work in a step, or shorter text."""
    if plan.method in ROLLOUT and plan.batch > 1:
        sizes = divisors(plan.batch)
        levels: list[Level] = [{"batch": size} for size in sizes]
        if "minibatch" in plan.given:
            levels = [{"batch": n, "minibatch": min(n, plan.minibatch)} for n in sizes]
        yield "fewer samples in a step", levels
    if plan.method == "inference" and plan.concurrency > 1:
        yield "fewer sequences at a time", one("concurrency", *_halves(plan.concurrency, 1))
    for field in ("response", "prompt", "sequence", "context"):
        if (tokens := getattr(plan, field)) and tokens > 128:
            yield f"a shorter {field}", one(field, *_halves(tokens, 128))


def _halves(number: int, least: int) -> list[int]:
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found


def _trained(plan: Plan) -> Offers:
    """Less that trains."""
    if plan.lora_rank and plan.lora_rank > 4:
        yield "a lower rank learns less", one("lora_rank", *_halves(plan.lora_rank, 4))
    if plan.lora_targets == "all-linear":
        yield "adapters on attention alone", one("lora_targets", "attention")
    if plan.critic_tuning == "full" and plan.tuning != "full":
        yield "adapters train in the critic", one("critic_tuning", "lora", "qlora")
    if plan.optimizer not in ("sgd", "adafactor"):
        yield "factored second moments, no first", one("optimizer", "adafactor")
    if plan.tuning == "full":
        yield "adapters train, not the weights", one("tuning", "lora")
        yield "adapters train on a 4-bit base", one("tuning", "qlora")


def _roles(plan: Plan) -> Offers:
    """Fewer or smaller models beside the policy."""
    if plan.method in ROLLOUT and plan.reference == "copy":
        yield "no KL penalty towards the start", one("reference", "none")
    if plan.method == "ppo" and plan.critic != "shared":
        if plan.critic != "adapter":
            yield "the critic is an adapter on the policy's base", one("critic", "adapter")
        yield "the critic is a value head on the policy", one("critic", "shared")
    if plan.reward_architecture is not None:
        smaller = [{"reward_model": m} for m in smaller_rewards(plan)]
        yield "a smaller reward model judges", smaller
        yield "the reward is an adapter on the policy's base", one("reward_model", "adapter")
        yield "only for what a program can judge", one("reward_model", "rule")
    if plan.method == "ppo":
        group = max(n for n in range(1, 9) if plan.batch % n == 0)
        effect = f"no critic: {group} completions of a prompt are compared"
        yield effect, [{"method": "grpo", "group": group}] if group > 1 else []
    if plan.method in ROLLOUT:
        effect = "preference pairs: no rollout, reward model or critic"
        yield effect, [{"method": "dpo", "sequence": plan.prompt + plan.response}]


def smaller_models(model: Model) -> list[Model]:
    """Models of the same family with fewer parameters, the largest first."""
    return [m for m in family_of(model) if m.params < 0.9 * model.params]


def family_of(model: Model) -> list[Model]:
    """The model's family (with Llama 3.1 all of 3.x), one model for each size, the largest first.

    Only what the estimate covers. Of several with one size: of the very family, tuned as the model
    is, the newest.
    """
    family, sizes = _generation(model.family), dict[int, catalog.Row]()

    def nearness(entry: catalog.Row) -> tuple[bool, bool, str]:
        tuned = _tuned(entry["id"]) == _tuned(model.id)
        return entry["family"] == model.family, tuned, entry.get("release_date") or ""

    same = [
        entry
        for entry in catalog.model_entries()
        if entry["family"] == model.family
        or (_generation(entry["family"]) == family and entry["model_type"] == model.model_type)
    ]
    for entry in sorted(same, key=nearness):
        if entry.get("params"):
            sizes[entry["params"]] = entry  # the nearest comes last
    found = [catalog.model(sizes[size]) for size in sorted(sizes, reverse=True)]
    return [m for m in found if not covered(m)]


def _tuned(name: str) -> bool:
    return "instruct" in name.lower() or "chat" in name.lower() or name.endswith("-it")


def _generation(family: str) -> str:
    """A family's name without minor versions: llama-3.1 and llama-3.2 are llama-3."""
    return re.sub(r"\.\d+", "", family.lower())


def smaller_rewards(plan: Plan) -> list[Model]:
    """Reward models on the policy's family that are smaller than this plan's, the largest first."""
    now, family = plan.reward_architecture, _generation(plan.model.family)
    bases = {e["id"] for e in catalog.model_entries() if _generation(e["family"]) == family}
    sizes: dict[int, catalog.Row] = {}
    for row in catalog.rows("reward_models.json", "reward_models"):
        if now and row["root_base_model"] in bases and row["params"] < 0.9 * now.params:
            sizes.setdefault(row["params"], row)
    rows = [sizes[size] for size in sorted(sizes, reverse=True)]
    found = [catalog.under_reward(row["id"], row["root_base_model"]) for row in rows]
    return [model for model in found if not covered(model)]
