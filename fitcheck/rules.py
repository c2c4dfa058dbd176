"""What a plan must satisfy: each value alone, and those that must agree. Errors name the flag.

To forbid a combination, add it to the function of its subject below, with the way out as the hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fitcheck.errors import FitCheckError
from fitcheck.model import Model
from fitcheck.weights import has_closed_form, weights

if TYPE_CHECKING:
    from fitcheck.plan import Plan

LARGEST = 100_000_000  # more tokens or sequences than this is a slip of the finger
_LEAST_RAM, _LARGEST_RAM = 2**20, 2**50  # and so is a host of less than a MiB, more than a PiB


def flag_of(name: str) -> str:
    """The command-line flag of a field: `lora_rank` is --lora-rank."""
    return "--" + name.replace("_", "-")


def choice_error(name: str, value: object, choices: tuple[str, ...]) -> FitCheckError:
    return FitCheckError(
        f"{flag_of(name)} cannot be {value!r}", f"choose one of: {', '.join(choices)}"
    )


def check_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FitCheckError(
            f"{flag_of(name)} cannot be {value!r}", f"a whole number from {least} to {most:,}"
        )


def check_list(name: str, value: object, choices: tuple[str, ...]) -> None:
    """offload: some of its choices, or nothing; lora_targets: one of them, or names of layers."""
    if name == "offload":
        if not isinstance(value, tuple):
            raise choice_error(name, value, choices)
        for part in value:
            if part not in choices:
                raise choice_error(name, part, choices)
    elif value not in choices:
        named = isinstance(value, tuple) and all(isinstance(part, str) and part for part in value)
        if not value or not named:
            raise choice_error(name, value, (*choices, "names of layers by comma"))


def check_together(plan: Plan) -> None:
    """What two or more fields must agree on."""
    for name in ("gpus", "nodes"):
        check_whole(name, getattr(plan, name), 1, LARGEST)
    _check_cards(plan)
    if plan.ram is not None:
        check_whole("ram", plan.ram, 1, _LARGEST_RAM)
        if plan.ram < _LEAST_RAM:
            raise FitCheckError(f"--ram {plan.ram} is in bytes", "add a unit, such as 64gib")
    _check_length(plan, plan.model, _SHORTER[plan.method])
    if plan.attention == "flash":
        _check_flash(plan)
    if plan.method == "inference":
        _check_inference(plan)
    else:
        _check_sizes(plan)
        _check_training(plan)


def _check_cards(plan: Plan) -> None:
    """Cards side by side in one machine; what the ways to share the work among them cannot do."""
    way = f"--sharding {plan.sharding}"
    if plan.nodes > 1:
        raise FitCheckError(
            "more than one machine is not modelled", "use --nodes 1; --gpus may be more than one"
        )
    if (plan.gpus == 1) != (plan.sharding == "none"):
        if plan.gpus == 1:
            raise FitCheckError(f"{way} shares work among cards, and there is one", "add --gpus 2")
        raise FitCheckError(
            f"--sharding none leaves {plan.gpus - 1} of the {plan.gpus} cards without work",
            "use --sharding ddp, or zero1, zero2, zero3 or fsdp to split what a card holds",
        )
    if plan.gpus > 1 and plan.gpu.unified_memory:
        raise FitCheckError(
            f"{plan.gpu.name} is part of its machine: several do not sit side by side", "--gpus 1"
        )
    if plan.gpus > 1 and plan.recipe == "trl":
        raise FitCheckError(
            "--recipe trl is modelled on one card", "use --recipe plain, or leave out --gpus"
        )
    if plan.sharding in ("none", "ddp"):
        return
    if plan.method == "inference":
        raise FitCheckError(
            f"{way} splits a training step; a model that is too large for one card to run needs "
            "tensor parallelism, which is not modelled",
            "use --sharding ddp (a copy on each card), or a smaller --quant",
        )
    if plan.optimizer in ("adafactor", "muon"):
        raise FitCheckError(
            f"{way} cuts tensors into flat parts, and {plan.optimizer} needs whole matrices",
            "use another --optimizer, or --sharding ddp",
        )
    if plan.sharding == "fsdp" and plan.precision == "bf16-master":
        raise FitCheckError(
            "--precision bf16-master is DeepSpeed's and Megatron's; FSDP's shards are themselves "
            "the fp32 weights",
            "use --precision bf16-mixed, or --sharding zero3",
        )


_SHORTER = dict.fromkeys(("sft", "reward", "dpo"), "lower --sequence")
_SHORTER |= dict.fromkeys(("ppo", "grpo"), "lower --prompt or --response")
_SHORTER |= {"inference": "lower --context"}


def _check_length(plan: Plan, model: Model, hint: str) -> None:
    longest = model.max_position_embeddings
    if longest and plan.tokens > longest:
        raise FitCheckError(
            f"{plan.tokens:,} tokens are more than the {longest:,} that {model.id} can read", hint
        )


def _check_flash(plan: Plan) -> None:
    """What flash-attn 2 runs on: 16-bit products, NVIDIA cards from Ampere on (its README)."""
    if plan.compute_dtype == "fp32":
        raise FitCheckError(
            "--attention flash computes in 16 bits, and --precision fp32 does not",
            "use --attention sdpa",
        )
    capability = plan.gpu.compute_capability
    if plan.gpu.vendor in ("apple", "intel") or (capability and capability < (8, 0)):
        raise FitCheckError(
            f"--attention flash does not run on {plan.gpu.name}: it needs Ampere or newer",
            "use --attention sdpa",
        )


def _check_engine(plan: Plan) -> None:
    """What each engine runs."""
    held = plan.model.checkpoint if plan.quant == "checkpoint" else None
    gguf = held.format == "gguf" if held else plan.quant[:2] in _GGUF
    if gguf and plan.engine != "llama.cpp":
        raise FitCheckError(
            f"--engine {plan.engine} does not run GGUF's {plan.quant}", "use --engine llama.cpp"
        )
    plain = plan.quant in ("bf16", "fp16", "fp32")
    if plan.engine == "llama.cpp" and not gguf and not plain:
        raise FitCheckError(
            f"--engine llama.cpp does not run {plan.quant}",
            "use a type of GGUF, such as --quant q4_k_m, or --engine vllm",
        )
    caches = {"llama.cpp": ("fp8",), "vllm": ("q8_0", "q4_0", "fp32")}
    caches["sglang"] = caches["vllm"]
    if plan.kv_cache in caches.get(plan.engine, ()):
        other = "q8_0" if plan.engine == "llama.cpp" else "fp8"
        raise FitCheckError(
            f"--engine {plan.engine} has no KV cache of {plan.kv_cache}",
            f"use --kv-cache {other}, or leave it out",
        )


_GGUF = ("q8", "q6", "q5", "q4", "q3", "q2", "iq")  # how its types begin


def _check_inference(plan: Plan) -> None:
    _check_engine(plan)
    if plan.precision.endswith(("-mixed", "-autocast", "-master")):
        raise choice_error("precision", plan.precision, ("bf16", "fp16", "fp32"))
    if plan.quant in ("bf16", "fp16", "fp32") and plan.quant != plan.precision:
        raise FitCheckError(
            f"--quant {plan.quant} weights are multiplied as they are, not in {plan.precision}",
            f"use --precision {plan.quant}, or leave it out",
        )


def _check_sizes(plan: Plan) -> None:
    """Each size divides the next larger one; micro_batch and score_batch are those of each card."""
    links = [("micro_batch", "batch", plan.gpus)]
    if plan.minibatch:
        links = [("micro_batch", "minibatch", plan.gpus), ("minibatch", "batch", 1)]
    if plan.score_batch and plan.recipe == "trl":
        _check_scored(plan)
    elif plan.score_batch:  # DPO's reference scores what the policy just saw
        dpo = plan.method == "dpo"
        links.append(("score_batch", *(("micro_batch", 1) if dpo else ("batch", plan.gpus))))
    if plan.group:
        links.append(("group", "batch", 1))
    for small, large, cards in links:
        size, whole = getattr(plan, small), getattr(plan, large)
        if whole % (size * cards):
            each = f" on each of {cards} cards" if cards > 1 else ""
            raise FitCheckError(
                f"{flag_of(small)} {size}{each} does not divide {flag_of(large)} {whole}",
                "choose sizes where each divides the next larger one",
            )


def _check_scored(plan: Plan) -> None:
    """TRL: PPO's local_rollout_forward_batch_size is free, the others score a micro-batch."""
    if plan.method != "ppo" and plan.score_batch != plan.micro_batch:
        raise FitCheckError(
            f"--score-batch {plan.score_batch}: trl's {plan.method} scores a micro-batch at a time",
            f"leave it out, or --micro-batch {plan.score_batch}",
        )


def _check_training(plan: Plan) -> None:
    adapters = plan.tuning != "full"
    if adapters and plan.precision == "bf16-master":
        raise FitCheckError(
            "--precision bf16-master keeps fp32 copies of weights that train; adapters need none",
            "use --precision bf16-autocast --adapter-precision fp32",
        )
    if plan.padding == "packed" and plan.attention != "flash":
        raise FitCheckError(
            "--padding packed needs an attention kernel for rows of different lengths",
            "add --attention flash",
        )
    _check_reference(plan, adapters)
    for name in ("reward_model", "critic"):
        if getattr(plan, name) == "adapter" and not adapters:
            raise FitCheckError(
                f"{flag_of(name)} adapter needs a frozen base to sit on",
                "add --tuning lora or --tuning qlora",
            )
    for flag, model in (
        ("--reward-model", plan.reward_architecture),
        ("--critic", plan.critic_architecture),
    ):
        if model is not None:
            _check_length(plan, model, f"lower --prompt or --response, or choose another {flag}")
    _check_offload(plan)
    if plan.lora_rank:
        _check_adapters(plan)


def _check_adapters(plan: Plan) -> None:
    """A rank that is one, and names of layers that exist."""
    models = [plan.model] if plan.tuning != "full" else []
    if plan.critic_architecture and plan.critic_tuning != "full":
        models.append(plan.critic_architecture)
    models = [model for model in models if model.hidden_size]  # else nothing covers it anyway
    narrowest = min(models, key=lambda model: model.hidden_size, default=None)
    if narrowest and plan.lora_rank > narrowest.hidden_size:
        raise FitCheckError(
            f"--lora-rank {plan.lora_rank:,} is more than the width of {narrowest.id}, "
            f"{narrowest.hidden_size:,}",
            "ranks of 8 to 256 are usual",
        )
    if isinstance(plan.lora_targets, str) or not all(map(has_closed_form, models)):
        return
    known = {
        model.id: {w.name.rpartition(".")[2] for w in weights(model) if w.kind == "linear"}
        for model in models
    }
    for name in plan.lora_targets:
        if not any(name in names for names in known.values()):
            raise _no_layer(repr(name), known)
    for owner, names in known.items():
        if not names.intersection(plan.lora_targets):
            raise _no_layer(" or ".join(map(repr, plan.lora_targets)), {owner: names})


def _no_layer(called: str, known: Mapping[str, set[str]]) -> FitCheckError:
    owner, names = next(iter(known.items()))
    return FitCheckError(
        f"--lora-targets: no linear layer of {owner} is called {called}",
        f"its linear layers: {', '.join(sorted(names))}; or all-linear, or attention",
    )


def _check_reference(plan: Plan, adapters: bool) -> None:
    if plan.reference == "adapter" and not adapters:
        raise FitCheckError(
            "--reference adapter needs an adapter to switch off, and --tuning full has none",
            "use --reference copy, or --tuning lora",
        )
    if plan.reference == "precomputed" and plan.method != "dpo":
        raise FitCheckError(
            f"--reference precomputed is for dpo: {plan.method} writes new text in every step",
            "use --reference copy, or adapter with LoRA",
        )
    if plan.reference == "none" and plan.method == "dpo":
        raise FitCheckError("dpo compares with a reference", "use copy, adapter or precomputed")


def _check_offload(plan: Plan) -> None:
    held = {
        "reference": plan.reference == "copy",
        "reward": plan.reward_architecture is not None,
        "critic": plan.critic_architecture is not None,
        "optimizer": True,
    }
    for part in plan.offload:
        if not held[part]:
            raise FitCheckError(
                f"--offload {part}: this plan keeps no {part} of its own", "leave it out"
            )
    if "optimizer" in plan.offload and plan.optimizer not in ("adamw", "adamw-fused"):
        raise FitCheckError(
            f"--offload optimizer runs Adam on the CPU, not {plan.optimizer}",
            "use --optimizer adamw, or leave the optimizer on the card",
        )
