"""Plan -> the modules of a training step: policy, reference, reward model, critic, optimizers.

    roles = build(plan, torch.device("meta"))      # shapes only: the dry run
    roles = build(plan, torch.device("cuda"))      # real weights, random

Nothing is downloaded; the weights are random, since only their shapes decide memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitcheck.bench.adapters import (
    adapter_parameters,
    add_adapter,
    set_adapter,
    without_adapters,
)
from fitcheck.bench.configs import empty_module
from fitcheck.bench.habits import keep_presents, widen_norms
from fitcheck.bench.offload import to_card, to_ram
from fitcheck.bench.optimizers import Optimizer, optimizer_for
from fitcheck.bench.precision import DTYPES, autocast, checkpoint_contexts, keep_rotary_in_fp32
from fitcheck.bench.quantized import materialize, quantize
from fitcheck.errors import FitCheckError
from fitcheck.model import Model
from fitcheck.plan import TRANSFORMERS_QUANTS, Plan


class Scorer(nn.Module):
    """A backbone with a score head: a reward model or a critic, one number per position."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, **inputs: Any) -> Tensor:
        """Scores [rows, tokens]."""
        return self.head(self.backbone(**inputs).last_hidden_state).squeeze(-1)  # type: ignore[no-any-return]


@dataclass(slots=True)
class Trained:
    """What an optimizer trains, and that optimizer."""

    parameters: list[nn.Parameter]
    optimizer: Optimizer

    def step(self) -> Tensor:
        """Clip to norm 1, update, drop the gradients; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


@dataclass(slots=True)
class Roles:
    """The modules of one step; None where the plan has no such role of its own."""

    plan: Plan
    device: torch.device
    policy: Any  # a causal language model of transformers; the Scorer that method "reward" trains
    reference: Any
    reward: Scorer | None
    critic: Scorer | None
    value_head: nn.Linear | None  # the shared critic: a head on the policy's last hidden state
    policy_training: Any  # Trained; None where nothing trains
    critic_training: Trained | None  # None too where the policy's optimizer trains both (trl)
    kept: Any = None  # what a recipe's step leaves for the next one to replace

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision region of this plan; does nothing where it has none."""
        if not self.plan.autocast:
            return nullcontext()
        return autocast(self.device, DTYPES[self.plan.compute_dtype])

    @contextmanager
    def acting(self, role: str) -> Iterator[None]:
        """Within, that role is ready: on the card if it is kept in RAM, its adapter in place."""
        plan = self.plan
        knobs = {"reference": plan.reference, "reward": plan.reward_model, "critic": plan.critic}
        if role in plan.offload:
            module = getattr(self, role)
            to_card(module, self.device)
            yield
            to_ram(module)
        elif knobs.get(role) != "adapter":
            yield
        elif role == "reference":
            with without_adapters(self.policy):
                yield
        else:
            set_adapter(self.policy, role, frozen=role == "reward")
            yield
            set_adapter(self.policy, "policy")


def build(plan: Plan, device: torch.device, attn_implementation: str | None = None) -> Roles:
    """The roles of a plan on that device; FitCheckError for a model that cannot be built.

    `attn_implementation` is a name that transformers knows; by default that of the plan.
    """
    if plan.gpus > 1:
        raise FitCheckError(
            f"--gpus {plan.gpus}: a dry run or a measurement plays the step of a single card",
            "--gpus 1, or the estimate: fitcheck check",
        )
    builder = _Builder(plan, device, attn_implementation or _attention(plan, device))
    return builder.served() if plan.method == "inference" else builder.roles()


def _check_engine(plan: Plan) -> None:
    """What transformers itself cannot run is not to be played with it."""
    if plan.engine != "transformers" and plan.quant in TRANSFORMERS_QUANTS:
        raise FitCheckError(
            f"--engine {plan.engine} is not for a dry run, which plays transformers alone",
            "leave it out; or the estimate: fitcheck check",
        )
    if plan.quant not in TRANSFORMERS_QUANTS:
        raise FitCheckError(
            f"--quant {plan.quant} is not for a dry run, which plays the transformers engine alone",
            f"choose one of: {', '.join(TRANSFORMERS_QUANTS)}; or the estimate: fitcheck check",
        )
    if plan.kv_cache != plan.compute_dtype:
        raise FitCheckError(
            f"--kv-cache {plan.kv_cache} is not for a dry run: the transformers engine keeps keys "
            f"and values as it computes them, in {plan.compute_dtype}",
            f"--kv-cache {plan.compute_dtype}, or the estimate: fitcheck check",
        )


def _attention(plan: Plan, device: torch.device) -> str | None:
    """None lets transformers choose: sdpa, or eager for the few classes that have no sdpa."""
    if plan.attention == "flash" and device.type == "cuda":
        return "flash_attention_2"
    return "eager" if plan.attention == "eager" else None


@dataclass(slots=True)
class _Builder:
    plan: Plan
    device: torch.device
    attention: str | None

    def served(self) -> Roles:
        """The model to run, alone."""
        plan = self.plan
        _check_engine(plan)
        quant = plan.quant if plan.quant in ("int8", "nf4") else None
        policy = self.module(plan.model, plan.compute_dtype, quant, headless=False)
        policy.requires_grad_(False).eval()
        return Roles(plan, self.device, policy, *[None] * 6)

    def roles(self) -> Roles:
        """All of them, each in its type and on its device."""
        plan = self.plan
        reference = value_head = critic = None
        policy = self.base(plan.model, plan.tuning, headless=plan.method == "reward")
        if plan.reference == "copy":
            reference = self.reference(policy)
        self.prepare(policy, plan.tuning, "policy")
        trained = _trained(policy)
        if plan.method == "reward":
            policy = Scorer(policy, self.head(plan.model, plan.weight_dtype))
            trained += policy.head.parameters()
        reward = self.reward(policy)
        if plan.critic == "shared":
            value_head = self.head(plan.model, plan.weight_dtype)
            trained += value_head.parameters()
        elif plan.critic is not None:
            critic = self.critic(policy)
        if "adapter" in (plan.reward_model, plan.critic):
            set_adapter(policy, "policy")
        together = critic is not None and plan.recipe == "trl"
        if critic is not None and together:
            trained += critic.parameters()
        return Roles(
            plan=plan,
            device=self.device,
            policy=policy,
            reference=reference,
            reward=reward,
            critic=critic,
            value_head=value_head,
            policy_training=Trained(trained, optimizer_for(plan, trained)),
            critic_training=self.critic_training(critic) if critic and not together else None,
        )

    def base(self, model: Model, tuning: str, headless: bool) -> Any:
        """What trains, or what adapters will sit on."""
        quant = "nf4" if tuning == "qlora" else None
        dtype = self.plan.compute_dtype if quant else self.plan.weight_dtype
        return self.module(model, dtype, quant, headless)

    def module(self, model: Model, dtype: str, quant: str | None, headless: bool) -> Any:
        """A model in that type, without its vocabulary head where there is no use for one."""
        module = empty_module(model, DTYPES[dtype], self.attention, headless)
        if quant:
            quantize(module, quant, DTYPES[dtype], self.device)
        materialize(module, self.device)
        if self.device.type == "meta":
            keep_rotary_in_fp32(module)
        return module

    def prepare(self, module: Any, tuning: str, role: str) -> None:
        """Make a module ready to train: its adapter, its checkpointing."""
        plan = self.plan
        if tuning != "full":
            add_adapter(plan, module, role)
        if plan.checkpointing:
            kwargs = {"use_reentrant": False, "context_fn": checkpoint_contexts}
            enable = "activation_checkpointing_enable"
            if not hasattr(module, enable):  # its name before transformers 5.24
                enable = "gradient_checkpointing_enable"
            getattr(module, enable)(kwargs)
            if plan.recipe == "trl" and tuning != "full":
                module.enable_input_require_grads()  # sft_trainer.py and others
        keep_presents(plan, module)
        widen_norms(plan, module)

    def reference(self, policy: Any) -> Any:
        """A frozen copy of the policy, in the compute type; TRL's is in the policy's own type.

        And TRL never tells its reference that it is frozen, so autocast keeps casts of its weights.
        """
        plan = self.plan
        trl = plan.recipe == "trl"
        dtype = plan.weight_dtype if trl else plan.compute_dtype
        reference = self.module(plan.model, dtype, None, headless=False)
        if plan.tuning != "qlora":
            _copy_weights(policy, reference)
        if trl:
            return reference
        return self.frozen(reference, "reference")

    def reward(self, policy: Any) -> Scorer | None:
        """The reward model: frozen, in the compute type or quantized."""
        plan = self.plan
        if plan.reward_model == "adapter":
            add_adapter(plan, policy, "reward")
            head = self.head(plan.model, plan.compute_dtype).requires_grad_(False)
            return Scorer(policy.base_model, head)
        model = plan.reward_architecture
        if model is None:
            return None
        quant = plan.reward_precision if plan.reward_precision in ("int8", "nf4") else None
        backbone = self.module(model, plan.compute_dtype, quant, headless=True)
        scorer: Scorer = self.frozen(
            Scorer(backbone, self.head(model, plan.compute_dtype)), "reward"
        )
        return scorer

    def critic(self, policy: Any) -> Scorer:
        """The critic: it trains as critic_tuning says, its head always."""
        plan = self.plan
        if plan.critic == "adapter":
            add_adapter(plan, policy, "critic")
            return Scorer(policy.base_model, self.head(plan.model, plan.weight_dtype))
        model = plan.critic_architecture
        assert model is not None
        backbone = self.base(model, plan.critic_tuning, headless=True)
        self.prepare(backbone, plan.critic_tuning, "critic")
        critic = Scorer(backbone, self.head(model, plan.weight_dtype))
        if "critic" in plan.offload:
            to_ram(critic)
        return critic

    def critic_training(self, critic: Scorer) -> Trained:
        """What of the critic trains."""
        if self.plan.critic_tuning == "full":
            parameters = _trained(critic.backbone)
        else:
            parameters = adapter_parameters(critic.backbone, "critic")
        parameters += critic.head.parameters()
        return Trained(parameters, optimizer_for(self.plan, parameters))

    def head(self, model: Model, dtype: str) -> nn.Linear:
        """A score or value head."""
        return nn.Linear(
            model.embedding_width, 1, bias=False, device=self.device, dtype=DTYPES[dtype]
        )

    def frozen(self, module: Any, role: str) -> Any:
        """Not trained, and in RAM for as long as it is not needed if the plan says so."""
        module.requires_grad_(False).eval()
        if role in self.plan.offload:
            to_ram(module)
        return module


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of a module of the same shape."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        ours.copy_(theirs)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
