"""A Plan: one model, one method, its knobs, and the card it should fit on.

Every knob is one field below; its command-line flag, JSON key, screen row and help all derive from
that field. None means "the default for this method"; a field that the method does not use stays None.

    Plan(model=llama, gpu=rtx4090, method="ppo", tuning="lora").precision  # "bf16-autocast"
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fitcheck.errors import FitCheckError
from fitcheck.gpu import GPU, UsableMemory
from fitcheck.model import Model

METHODS = ("ppo", "inference", "sft", "reward", "dpo", "grpo")
TRAINING = ("ppo", "sft", "reward", "dpo", "grpo")
ROLLOUT = ("ppo", "grpo")
EXAMPLES = ("sft", "reward", "dpo")
LORA_TARGETS = ("all-linear", "attention")
PRECISIONS = ("bf16", "fp16", "fp32", "bf16-mixed", "fp16-mixed", "bf16-autocast", "bf16-master")
OPTIMIZERS = (
    *("adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit"),
    *("adafactor", "lion", "sgd", "muon"),
)
OFFLOADS = ("reference", "reward", "critic", "optimizer")
GGUF_QUANTS = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs", "f16", "bf16"),
)
QUANTS = ("bf16", "fp16", "fp32", "fp8", "int8", "nf4", "awq", "gptq", "mxfp4", *GGUF_QUANTS[:-2])
KV_TYPES = ("bf16", "fp16", "fp8", "q8_0", "q4_0")
_LARGEST = 100_000_000  # more tokens or sequences than this is a slip of the finger


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
    sharding: str = knob("how several cards share the work", METHODS, choices=("none",))
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
    loss: str = knob("how logits are made", TRAINING, choices=("full", "chunked", "fused"))
    sequence: int = knob("tokens of one example, prompt and completion", EXAMPLES, "int")
    prompt: int = knob("prompt tokens", ROLLOUT, "int")
    response: int = knob("response tokens", ROLLOUT, "int")
    batch: int = knob("prompts, completions, pairs or examples per batch", TRAINING, "int")
    micro_batch: int = knob("of these, in one forward and backward", TRAINING, "int")
    minibatch: int = knob("sequences in one optimizer step", ROLLOUT, "int")
    score_batch: int = knob("sequences in one forward without gradients", TRAINING, "int")
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
        "the reference policy",
        *(("ppo", "grpo", "dpo"), "choice", ("copy", "adapter", "precomputed", "none")),
    )
    offload: tuple[str, ...] = knob("kept in RAM while not in use", TRAINING, "list", OFFLOADS)
    empty_cache: bool = knob("empty the allocator's cache between phases", TRAINING, "flag")
    rollout: str = knob("what generates", ROLLOUT, choices=("transformers", "vllm", "sglang"))
    rollout_memory: float = knob("share of the card that engine reserves", ROLLOUT, "share")
    rollout_sleep: bool = knob("the engine lets go during the update", ROLLOUT, "flag")
    recipe: str = knob("a framework's habits", METHODS, choices=("plain", "hf-4.48"))
    quant: str = knob("type of the weights", ("inference",), choices=QUANTS)
    context: int = knob("tokens of one sequence", ("inference",), "int")
    concurrency: int = knob("sequences at a time", ("inference",), "int")
    kv_cache: str = knob("type of the KV cache", ("inference",), choices=KV_TYPES)
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.method not in METHODS:
            raise _choice_error("method", self.method, METHODS)
        if self.memory is None:
            put(self, "memory", self.gpu.usable_memory())
        put(self, "given", frozenset(name for name in KNOBS if getattr(self, name) is not None))
        for name in self.given:
            _check_value(self, name)
        for name, value in _defaults(self).items():
            if getattr(self, name) is None:
                put(self, name, value)
        _check_together(self)

    def change(self, **changes: Any) -> Plan:
        """This plan with some fields changed; what was never set explicitly follows its defaults."""
        method = changes.get("method", self.method)
        kept = {n: getattr(self, n) for n in self.given if method in KNOBS[n]["methods"]}
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
        """All fields as JSON values, ids as strings; `fitcheck.answer.plan_from` reads it back."""
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "given":
                continue
            if isinstance(value, (Model, GPU)):
                value = value.id
            elif isinstance(value, UsableMemory):
                value = dataclasses.asdict(value)
            elif isinstance(value, tuple):
                value = list(value)
            values[f.name] = value
        return values


KNOBS: dict[str, Any] = {f.name: f.metadata for f in dataclasses.fields(Plan) if f.metadata}


def _defaults(plan: Plan) -> dict[str, Any]:
    """The default of every field that the method uses, given what was set explicitly."""
    method, given = plan.method, plan.given
    values: dict[str, Any] = {"sharding": "none", "attention": "sdpa", "recipe": "plain"}
    if method == "inference":
        return values | {
            **{"precision": "bf16", "quant": "bf16", "context": 4096},
            **{"concurrency": 1, "kv_cache": "bf16"},
        }
    tuning = plan.tuning or "full"
    batch = plan.batch or 8
    adapters = tuning != "full"
    values |= {
        **{"tuning": tuning, "optimizer": "adamw", "checkpointing": True, "loss": "full"},
        **{"precision": "bf16-autocast" if adapters else "bf16-mixed"},
        **{"padding": "none" if method == "sft" else "padded", "batch": batch, "micro_batch": 1},
        **{"offload": (), "empty_cache": False},
    }
    critic_adapters = (plan.critic_tuning or tuning) != "full" and plan.critic != "shared"
    if adapters or (method == "ppo" and critic_adapters):
        values |= {"lora_rank": 16, "lora_targets": "all-linear", "adapter_precision": "fp32"}
    if method in EXAMPLES:
        values["sequence"] = 2048
    if method in ("ppo", "grpo", "dpo"):
        values["reference"] = "adapter" if adapters else "copy"
        if method != "dpo" or plan.reference != "precomputed":
            values["score_batch"] = plan.micro_batch or 1
    if method in ROLLOUT:
        values |= {
            **{"prompt": 512, "response": 512, "minibatch": batch, "reward_model": "policy"},
            **{"epochs": 4 if method == "ppo" else 1, "rollout": "transformers"},
        }
        if plan.reward_model not in ("rule", "adapter"):
            values["reward_precision"] = "bf16"
        if plan.rollout in ("vllm", "sglang"):
            values |= {"rollout_memory": 0.3, "rollout_sleep": False}
    if method == "grpo":
        values["group"] = 8
    if method == "ppo":
        critic = plan.critic or ("adapter" if plan.reward_model == "adapter" else "reward")
        values |= {"ptx_batch": 0, "critic": critic}
        if critic not in ("shared", "adapter"):
            values["critic_tuning"] = tuning
    for name in given:
        values.pop(name, None)
    return values


def _choice_error(name: str, value: object, choices: tuple[str, ...]) -> FitCheckError:
    flag = "--" + name.replace("_", "-")
    return FitCheckError(f"{flag} cannot be {value!r}", f"choose one of: {', '.join(choices)}")


def _check_value(plan: Plan, name: str) -> None:
    """One explicitly set field: used by the method, of its type, among its choices."""
    value, knob = getattr(plan, name), KNOBS[name]
    flag, kind, choices = "--" + name.replace("_", "-"), knob["kind"], knob["choices"]
    if plan.method not in knob["methods"]:
        raise FitCheckError(
            f"{flag} has no meaning for {plan.method}",
            f"it is used by: {', '.join(knob['methods'])}",
        )
    if kind == "choice" and value not in choices:
        raise _choice_error(name, value, choices)
    if kind == "int":
        least = 0 if name == "ptx_batch" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
            raise FitCheckError(
                f"{flag} cannot be {value!r}", f"a whole number from {least} to {_LARGEST:,}"
            )
    if kind == "flag" and not isinstance(value, bool):
        raise _choice_error(name, value, ("on", "off"))
    if kind == "share" and not (isinstance(value, (int, float)) and 0 < value < 1):
        raise FitCheckError(f"{flag} cannot be {value!r}", "a share between 0 and 1, such as 0.3")
    if kind == "model" and not isinstance(value, Model) and value not in choices:
        raise _choice_error(name, value, (*choices, "a model of the catalog"))
    if name == "offload":
        for part in value:
            if part not in choices:
                raise _choice_error(name, part, choices)
    if name == "lora_targets" and isinstance(value, str) and value not in choices:
        raise _choice_error(name, value, (*choices, "a list of layer names"))


def _check_together(plan: Plan) -> None:
    """What two or more fields must agree on."""
    if plan.gpus != 1 or plan.nodes != 1:
        raise FitCheckError(
            "more than one GPU is not modelled yet",
            "ask for one card with --gpus 1 --nodes 1; sharding is on the way",
        )
    if plan.ram is not None and plan.ram <= 0:
        raise FitCheckError(f"--ram cannot be {plan.ram}", "bytes of memory, such as 64gib")
    longest = plan.model.max_position_embeddings
    if longest and plan.tokens > longest:
        raise FitCheckError(
            f"{plan.tokens:,} tokens are more than the {longest:,} that {plan.model.id} can read",
            "lower " + {"inference": "--context"}.get(plan.method, "--sequence")
            if plan.method not in ROLLOUT
            else "lower --prompt or --response",
        )
    if plan.method != "inference":
        _check_sizes(plan)
        _check_training(plan)
    elif plan.precision.endswith(("-mixed", "-autocast", "-master")):
        raise _choice_error("precision", plan.precision, ("bf16", "fp16", "fp32"))


def _check_sizes(plan: Plan) -> None:
    """Each size divides the next larger one."""
    chain = [("micro_batch", plan.micro_batch), ("minibatch", plan.minibatch)]
    pairs = [*chain, ("batch", plan.batch)] if plan.minibatch else [chain[0], ("batch", plan.batch)]
    links = list(zip(pairs, pairs[1:], strict=False))
    if plan.score_batch:
        links.append((("score_batch", plan.score_batch), ("batch", plan.batch)))
    if plan.group:
        links.append((("group", plan.group), ("batch", plan.batch)))
    for (small, size), (large, whole) in links:
        if whole % size:
            raise FitCheckError(
                f"--{small.replace('_', '-')} {size} does not divide --{large} {whole}",
                "choose sizes where each divides the next larger one",
            )


def _check_training(plan: Plan) -> None:
    adapters = plan.tuning != "full"
    if not adapters:
        for name in plan.given & {"lora_rank", "lora_targets", "adapter_precision"}:
            if plan.critic_tuning in (None, "full"):
                raise FitCheckError(
                    f"--{name.replace('_', '-')} has no meaning with --tuning full",
                    "add --tuning lora or --tuning qlora",
                )
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
                f"--{name.replace('_', '-')} adapter needs a frozen base to sit on",
                "add --tuning lora or --tuning qlora",
            )
    for model in (plan.reward_architecture, plan.critic_architecture):
        longest = model.max_position_embeddings if model else None
        if longest and plan.tokens > longest:
            raise FitCheckError(
                f"{plan.tokens:,} tokens are more than the {longest:,} that {model.id} can read",  # type: ignore[union-attr]
                "lower --prompt or --response, or choose another reward model",
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
    held = {
        "reference": plan.reference == "copy",
        "reward": plan.reward_architecture is not None,
        "critic": plan.critic_architecture is not None,
        "optimizer": plan.optimizer is not None,
    }
    for part in plan.offload:
        if not held[part]:
            raise FitCheckError(
                f"--offload {part}: this plan keeps no {part} of its own", "leave it out"
            )
