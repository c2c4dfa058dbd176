"""A Plan: one model, one method, its knobs, and the card it should fit on.

Every knob is one field below; its command-line flag, JSON key, screen row and help all derive from
that field. None means "the default for this method"; a field that a plan does not use stays None,
and setting it is an error. What values must satisfy is in rules.py.

    Plan(model=llama, gpu=rtx4090, method="ppo", tuning="lora").precision  # "bf16-autocast"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fitcheck.errors import FitCheckError
from fitcheck.gpu import GPU, UsableMemory
from fitcheck.model import Model
from fitcheck.recipes import BUILT_IN, FRAMEWORKS, check_recipe, defaults, runs_as
from fitcheck.rules import LARGEST, check_list, check_together, check_whole, choice_error, flag_of

METHODS = ("ppo", "inference", "sft", "reward", "dpo", "grpo")
TRAINING = ("ppo", "sft", "reward", "dpo", "grpo")
ROLLOUT = ("ppo", "grpo")
EXAMPLES = ("sft", "reward", "dpo")
SCORING = ("ppo", "grpo", "dpo")  # methods with a forward pass that needs no gradients
LOGITS = ("ppo", "sft", "dpo", "grpo")  # methods that train through the vocabulary
LORA_TARGETS = ("all-linear", "attention")
PRECISIONS = ("bf16", "fp16", "fp32", "bf16-mixed", "fp16-mixed", "bf16-autocast", "bf16-master")
OPTIMIZERS = (
    *("adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit"),
    *("adafactor", "lion", "sgd", "muon"),
)
SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
OFFLOADS = ("reference", "reward", "critic", "optimizer")
GGUF_QUANTS = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs", "f16", "bf16"),
)
QUANTS = ("bf16", "fp16", "fp32", "fp8", "int8", "nf4", "awq", "gptq", "mxfp4", *GGUF_QUANTS[:-2])
CHECKPOINT = "checkpoint"  # a quant of models that were read: as their files have it
TRANSFORMERS_QUANTS = ("bf16", "fp16", "fp32", "int8", "nf4")  # what that engine runs
GGUF_WEIGHTS = (*GGUF_QUANTS[:-2], "bf16", "fp16", "fp32", CHECKPOINT)
ENGINES = ("transformers", "llama.cpp", "vllm", "sglang")
KV_TYPES = ("bf16", "fp16", "fp32", "fp8", "q8_0", "q4_0")


def knob(
    doc: str, methods: tuple[str, ...], kind: str = "choice", choices: tuple[str, ...] = ()
) -> Any:
    """A field of Plan. kind: choice, int, flag, share, model (a choice or a model's name), list."""
    return field(
        default=None, metadata={"doc": doc, "methods": methods, "kind": kind, "choices": choices}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Resolved on construction: every field the method uses has its value; raises FitCheckError."""

    model: Model
    gpu: GPU
    method: str = "ppo"
    memory: UsableMemory = None  # type: ignore[assignment]  # filled in below; live or pretended
    gpus: int = 1
    nodes: int = 1
    ram: int | None = None
    sharding: str = knob("how several cards share the work", METHODS, choices=SHARDINGS)
    tuning: str = knob("what trains", TRAINING, choices=("full", "lora", "qlora"))
    lora_rank: int = knob("LoRA rank", TRAINING, "int")
    lora_targets: str | tuple[str, ...] = knob(
        "which linear layers get an adapter: all-linear, attention, or names by comma",
        *(TRAINING, "list", LORA_TARGETS),
    )
    adapter_precision: str = knob("type of LoRA adapters", TRAINING, choices=("fp32", "bf16"))
    precision: str = knob("types of weights, compute and states", METHODS, choices=PRECISIONS)
    optimizer: str = knob("optimizer", TRAINING, choices=OPTIMIZERS)
    checkpointing: bool = knob("activation (gradient) checkpointing", TRAINING, "flag")
    attention: str = knob("attention kernel", METHODS, choices=("sdpa", "flash", "eager"))
    padding: str = knob("rows of a batch", TRAINING, choices=("padded", "none", "packed"))
    loss: str = knob("how logits are made", LOGITS, choices=("full", "chunked", "fused"))
    sequence: int = knob("tokens of one example, prompt and completion", EXAMPLES, "int")
    prompt: int = knob("prompt tokens", ROLLOUT, "int")
    response: int = knob("response tokens", ROLLOUT, "int")
    batch: int = knob(
        "prompts, completions, pairs or examples per batch, all cards together", TRAINING, "int"
    )
    micro_batch: int = knob("of these, in one forward and backward of a card", TRAINING, "int")
    minibatch: int = knob("sequences in one optimizer step, all cards together", ROLLOUT, "int")
    score_batch: int = knob("sequences in one forward without gradients, of a card", SCORING, "int")
    epochs: int = knob("passes over a rollout batch", ROLLOUT, "int")
    group: int = knob("completions per prompt", ("grpo",), "int")
    ptx_batch: int = knob("pretraining sequences mixed into the update", ("ppo",), "int")
    reward_model: Model | str = knob(
        "reward model: a name from `fitcheck rewards` or models, or one of the choices",
        *(ROLLOUT, "model", ("policy", "adapter", "rule")),
    )
    reward_precision: str = knob("reward weights", ROLLOUT, choices=("bf16", "int8", "nf4"))
    critic: Model | str = knob(
        "the critic: a model's name, or one of the choices",
        *(("ppo",), "model", ("reward", "shared", "adapter")),
    )
    critic_tuning: str = knob("what of it trains", ("ppo",), choices=("full", "lora", "qlora"))
    reference: str = knob(
        *("the reference policy", SCORING, "choice"),
        choices=("copy", "adapter", "precomputed", "none"),
    )
    offload: tuple[str, ...] = knob("kept in RAM while not in use", TRAINING, "list", OFFLOADS)
    empty_cache: bool = knob("empty the allocator's cache between phases", TRAINING, "flag")
    rollout: str = knob("what generates", ROLLOUT, choices=("transformers", "vllm", "sglang"))
    rollout_memory: float = knob("share of the card that engine reserves", ROLLOUT, "share")
    rollout_sleep: bool = knob("the engine lets go during the update", ROLLOUT, "flag")
    recipe: str = knob(
        "a framework's habits: its defaults, residency and step order",
        *(METHODS, "choice", (*BUILT_IN, *FRAMEWORKS)),
    )
    engine: str = knob("what runs the model", ("inference",), choices=ENGINES)
    engine_memory: float = knob(
        "share of the card that vLLM or SGLang takes", ("inference",), "share"
    )
    quant: str = knob("type of the weights", ("inference",), choices=QUANTS)
    context: int = knob("tokens of one sequence", ("inference",), "int")
    concurrency: int = knob("sequences at a time, all cards together", ("inference",), "int")
    kv_cache: str = knob("type of the KV cache", ("inference",), choices=KV_TYPES)
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.method not in METHODS:
            raise choice_error("method", self.method, METHODS)
        if self.memory is None:
            put(self, "memory", self.gpu.usable_memory())
        put(self, "given", frozenset(name for name in KNOBS if getattr(self, name) is not None))
        for name in sorted(self.given):
            _check_value(self, name)
            check_recipe(self.recipe, self.method, name, getattr(self, name))
            put(self, name, runs_as(self.recipe, self.method, name, getattr(self, name)))
        wishes = {name: getattr(self, name) for name in self.given}
        used = _defaults(self.method, wishes | self._as_stored(wishes))
        if self.gpus != 1:
            used["sharding"] = "ddp"
        for name in sorted(self.given - used.keys()):
            raise FitCheckError(f"{flag_of(name)} has no meaning in this plan", _NEEDS[name])
        for name, value in used.items():
            if getattr(self, name) is None:
                put(self, name, value)
        check_together(self)

    def _as_stored(self, wishes: Mapping[str, Any]) -> dict[str, str]:
        """Quant and engine of a model that was read, where none is asked for: as its files are."""
        held = self.model.checkpoint
        if self.method != "inference" or held is None or "quant" in wishes:
            return {}
        if held.format == "gguf":
            return {"quant": CHECKPOINT, "engine": wishes.get("engine", "llama.cpp")}
        return {"quant": CHECKPOINT if held.quantization else wishes.get("precision", held.dtype)}

    def change(self, **changes: Any) -> Plan:
        """This plan with some fields changed.

        What was never set explicitly follows its defaults; what the changed plan has no use for
        is forgotten.
        """
        wishes = {name: getattr(self, name) for name in self.given} | changes
        wishes = {name: value for name, value in wishes.items() if value is not None}
        used = _defaults(changes.get("method", self.method), wishes)
        kept = {name: value for name, value in wishes.items() if name in used}
        if changes.get("gpus", self.gpus) != self.gpus and "sharding" not in changes:
            alone = 1 in (changes["gpus"], self.gpus)  # what one card does, several cannot
            kept = {name: value for name, value in kept.items() if name != "sharding" or not alone}
        hardware = {n: getattr(self, n) for n in ("model", "gpu", "gpus", "nodes", "ram")}
        if "gpu" not in changes:
            hardware["memory"] = self.memory
        return Plan(**{**hardware, "method": self.method, **kept, **changes})

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence that the method handles."""
        if self.method in ROLLOUT:
            return self.prompt + self.response
        return self.context if self.method == "inference" else self.sequence

    def on_card(self, number: int) -> int:
        """What a card gets of so many sequences; the one with most, where they do not divide."""
        return -(-number // self.gpus)

    @property
    def reward_architecture(self) -> Model | None:
        """The reward model's own architecture; None without one, or as an adapter on the policy."""
        if isinstance(self.reward_model, Model):
            return self.reward_model
        return self.model if self.reward_model == "policy" else None

    @property
    def critic_architecture(self) -> Model | None:
        """The critic's own architecture; None without one, or on the policy's weights."""
        if isinstance(self.critic, Model):
            return self.critic
        return (self.reward_architecture or self.model) if self.critic == "reward" else None

    @property
    def compute_dtype(self) -> str:
        """The type of matrix products and activations: bf16, fp16 or fp32."""
        return self.precision.partition("-")[0]

    @property
    def weight_dtype(self) -> str:
        """The type of the weights that train (or of the base that adapters sit on)."""
        return "fp32" if self.precision.endswith("-mixed") else self.compute_dtype

    @property
    def autocast(self) -> bool:
        """Whether forward passes run under torch.autocast."""
        return self.precision.endswith(("-mixed", "-autocast"))

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, ids as strings; `fitcheck.answer.plan_from` reads it back.

        Models that are not of the catalog go along whole, under `models`.
        """
        values: dict[str, Any] = {}
        held = [m for m in (self.model, self.reward_model, self.critic) if isinstance(m, Model)]
        if read := {model.id: model.to_json() for model in held if model.is_read}:
            values["models"] = read
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "given":
                continue
            if isinstance(value, (Model, GPU)):
                value = value.id
            elif isinstance(value, UsableMemory):
                value = value._asdict()
            elif isinstance(value, tuple):
                value = list(value)
            values[f.name] = value
        return values


KNOBS: dict[str, Any] = {f.name: f.metadata for f in dataclasses.fields(Plan) if f.metadata}


def used_fields(method: str, given: Mapping[str, Any]) -> frozenset[str]:
    """The fields that a plan of this method has a use for, where these are set explicitly."""
    return frozenset(_defaults(method, given))


def _defaults(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every field that a plan uses, given what was set explicitly."""
    habits = defaults(given.get("recipe", "plain"), method, given)
    values = _plain_defaults(method, {**habits, **given})
    return values | {name: value for name, value in habits.items() if name in values}


def _plain_defaults(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"sharding": "none", "attention": "sdpa", "recipe": "plain"}
    if method == "inference":
        quant = given.get("quant", "bf16")
        precision = quant if quant in ("fp16", "fp32") else "bf16"
        engine = "llama.cpp" if quant in GGUF_QUANTS[:-2] else "transformers"
        engine = given.get("engine", engine)
        if engine in ("vllm", "sglang"):
            values["engine_memory"] = 0.9 if engine == "vllm" else 0.88
        return values | {
            **{"engine": engine, "quant": quant, "context": 4096, "concurrency": 1},
            "precision": precision,
            "kv_cache": given.get("precision", precision),
        }
    tuning, batch = given.get("tuning", "full"), given.get("batch", 8)
    adapters = tuning != "full"
    values |= {
        **{"tuning": "full", "optimizer": "adamw", "checkpointing": True},
        **{"precision": "bf16-autocast" if adapters else "bf16-mixed"},
        **{"padding": "none" if method == "sft" else "padded", "batch": 8, "micro_batch": 1},
        **{"offload": (), "empty_cache": False},
    }
    if method in LOGITS:
        values["loss"] = "full"
    if method in EXAMPLES:
        values["sequence"] = 2048
    if method in SCORING:
        values["reference"] = "adapter" if adapters else "copy"
        if given.get("reference") != "precomputed":
            values["score_batch"] = given.get("micro_batch", 1)
    if method in ROLLOUT:
        values |= _rollout_defaults(method, given, batch)
    if method == "grpo":
        values["group"] = 8
    critic_tuning = "full"
    if method == "ppo":
        scored_on_policy = given.get("reward_model") == "adapter"
        values |= {"ptx_batch": 0, "critic": "adapter" if scored_on_policy else "reward"}
        if given.get("critic", values["critic"]) not in ("shared", "adapter"):
            values["critic_tuning"] = tuning
            critic_tuning = given.get("critic_tuning", tuning)
    if adapters or critic_tuning != "full":
        values |= {"lora_rank": 16, "lora_targets": "all-linear", "adapter_precision": "fp32"}
    return values


def _rollout_defaults(method: str, given: Mapping[str, Any], batch: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        **{"prompt": 512, "response": 512, "minibatch": batch, "reward_model": "policy"},
        **{"epochs": 4 if method == "ppo" else 1, "rollout": "transformers"},
    }
    if given.get("reward_model") not in ("rule", "adapter"):
        values["reward_precision"] = "bf16"
    if given.get("rollout") in ("vllm", "sglang"):
        values |= {"rollout_memory": 0.3, "rollout_sleep": False}
    return values


# Knobs that only some plans of a method use, and what would make a plan one of them.
_NEEDS = dict.fromkeys(
    ("lora_rank", "lora_targets", "adapter_precision"),
    "nothing has an adapter: add --tuning lora or --tuning qlora",
) | {
    "rollout_memory": "it is the share of an engine: add --rollout vllm or --rollout sglang",
    "rollout_sleep": "an engine can sleep: add --rollout vllm or --rollout sglang",
    "engine_memory": "it is the share of a server: add --engine vllm or --engine sglang",
    "reward_precision": "there is no reward model of its own: choose one with --reward-model",
    "critic_tuning": "there is no critic of its own: choose one with --critic",
    "score_batch": "with --reference precomputed no pass is without gradients",
}


def _check_value(plan: Plan, name: str) -> None:
    """One explicitly set field: used by the method, of its type, among its choices."""
    value, knob = getattr(plan, name), KNOBS[name]
    flag, kind, choices = flag_of(name), knob["kind"], knob["choices"]
    if plan.method not in knob["methods"]:
        raise FitCheckError(
            f"{flag} has no meaning for {plan.method}",
            f"it is used by: {', '.join(knob['methods'])}",
        )
    if name == "quant" and value == CHECKPOINT and plan.model.checkpoint is not None:
        return
    if kind == "choice" and value not in choices:
        raise choice_error(name, value, choices)
    if kind == "int":
        check_whole(name, value, 0 if name == "ptx_batch" else 1, LARGEST)
    if kind == "flag" and not isinstance(value, bool):
        raise choice_error(name, value, ("on", "off"))
    if kind == "share" and not (isinstance(value, (int, float)) and 0 < value < 1):
        raise FitCheckError(f"{flag} cannot be {value!r}", "a share between 0 and 1, such as 0.3")
    if kind == "model" and not isinstance(value, Model) and value not in choices:
        raise choice_error(name, value, (*choices, "a model of the catalog"))
    if kind == "list":
        check_list(name, value, choices)
