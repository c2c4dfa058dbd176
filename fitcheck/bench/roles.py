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
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from fitcheck.bench.adapters import (
    adapter_parameters,
    add_adapter,
    set_adapter,
    without_adapters,
)
from fitcheck.bench.configs import checked_size, config_from
from fitcheck.bench.optimizers import Optimizer, optimizer_for
from fitcheck.bench.precision import DTYPES, autocast, checkpoint_contexts, keep_rotary_in_fp32
from fitcheck.bench.quantized import quantize
from fitcheck.model import Model
from fitcheck.plan import Plan


class Scorer(nn.Module):
    """A backbone with a score head: a reward model or a critic, one number per position."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, **inputs: Any) -> Tensor:
        """Scores [rows, tokens]."""
        hidden = self.backbone(**inputs).last_hidden_state
        return self.head(hidden).squeeze(-1)  # type: ignore[no-any-return]


@dataclass(slots=True)
class Trained:
    """What an optimizer trains, and that optimizer."""

    parameters: list[nn.Parameter]
    optimizer: Optimizer

    def step(self) -> Tensor:
        """Clip to norm 1, update, drop the gradients; returns the norm before."""
        foreach = not self.parameters[0].is_meta  # torch refuses it there; both take little
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=foreach)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


@dataclass(slots=True)
class Roles:
    """The modules of one step; None where the plan has no such role of its own."""

    plan: Plan
    device: torch.device
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    reward: Scorer | None
    critic: Scorer | None
    value_head: nn.Linear | None  # the shared critic: a head on the policy's last hidden state
    policy_training: Trained
    critic_training: Trained | None

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision region of this plan; does nothing where it has none."""
        if not self.plan.autocast:
            return nullcontext()
        return autocast(self.device, DTYPES[self.plan.compute_dtype])

    @contextmanager
    def acting(self, role: str) -> Iterator[None]:
        """Within, the policy's weights act as another role, where an adapter makes them it."""
        plan = self.plan
        knobs = {"reference": plan.reference, "reward": plan.reward_model, "critic": plan.critic}
        if knobs.get(role) != "adapter":
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
    attention = attn_implementation or _attention(plan, device)
    policy: Any = _policy(plan, device, attention)
    value_head = reference = critic = None
    trained = _trained(policy)
    if plan.reference == "copy":
        reference = _frozen(_causal_lm(plan.model, plan.compute_dtype, device, attention))
        _copy_weights(policy, reference)
    reward = _reward(plan, device, attention, policy)
    if plan.critic == "shared":
        value_head = _head(plan.model, plan.weight_dtype, device)
        trained.append(value_head.weight)
    elif plan.critic is not None:
        critic = _critic(plan, device, attention, policy)
    if "adapter" in (plan.reward_model, plan.critic):
        set_adapter(policy, "policy")
    return Roles(
        plan=plan,
        device=device,
        policy=policy,
        reference=reference,
        reward=reward,
        critic=critic,
        value_head=value_head,
        policy_training=Trained(trained, optimizer_for(plan, trained)),
        critic_training=_critic_training(plan, critic) if critic else None,
    )


def _attention(plan: Plan, device: torch.device) -> str:
    if plan.attention == "flash":
        return "flash_attention_2" if device.type == "cuda" else "sdpa"
    return plan.attention


def _causal_lm(model: Model, dtype: str, device: torch.device, attention: str) -> PreTrainedModel:
    with device:
        module = AutoModelForCausalLM.from_config(
            config_from(model), dtype=DTYPES[dtype], attn_implementation=attention
        )
    checked_size(model, module)
    return _ready(module)


def _backbone(model: Model, dtype: str, device: torch.device, attention: str) -> PreTrainedModel:
    """The model without its vocabulary head."""
    with device:
        module = AutoModel.from_config(
            config_from(model), dtype=DTYPES[dtype], attn_implementation=attention
        )
    return _ready(module)


def _ready(module: PreTrainedModel) -> PreTrainedModel:
    if module.device.type == "meta":
        keep_rotary_in_fp32(module)
    return module


def _policy(plan: Plan, device: torch.device, attention: str) -> PreTrainedModel:
    policy = _causal_lm(plan.model, plan.weight_dtype, device, attention)
    _prepare_training(plan, policy, plan.tuning, "policy")
    return policy


def _prepare_training(plan: Plan, module: PreTrainedModel, tuning: str, role: str) -> None:
    """Freeze and quantize what the tuning says, add adapters, checkpoint the layers."""
    if tuning == "qlora":
        quantize(module, "nf4", DTYPES[plan.compute_dtype])
    if tuning != "full":
        add_adapter(plan, module, role)
    if plan.checkpointing:
        kwargs = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        module.activation_checkpointing_enable(kwargs)


def _reward(plan: Plan, device: torch.device, attention: str, policy: Any) -> Scorer | None:
    """The reward model: frozen, in the compute type or quantized."""
    if plan.reward_model == "adapter":
        add_adapter(plan, policy, "reward")
        return _frozen(Scorer(policy.base_model, _head(plan.model, plan.compute_dtype, device)))
    model = plan.reward_architecture
    if model is None:
        return None
    backbone = _backbone(model, plan.compute_dtype, device, attention)
    if plan.reward_precision in ("int8", "nf4"):
        quantize(backbone, plan.reward_precision, DTYPES[plan.compute_dtype])
    return _frozen(Scorer(backbone, _head(model, plan.compute_dtype, device)))


def _critic(plan: Plan, device: torch.device, attention: str, policy: Any) -> Scorer:
    """The critic: it trains as critic_tuning says, its head always."""
    if plan.critic == "adapter":
        add_adapter(plan, policy, "critic")
        return Scorer(policy.base_model, _head(plan.model, plan.weight_dtype, device))
    model = plan.critic_architecture
    assert model is not None
    backbone = _backbone(model, plan.weight_dtype, device, attention)
    _prepare_training(plan, backbone, plan.critic_tuning, "critic")
    return Scorer(backbone, _head(model, plan.weight_dtype, device))


def _critic_training(plan: Plan, critic: Scorer) -> Trained:
    own = plan.critic_tuning == "full"
    backbone = _trained(critic.backbone) if own else adapter_parameters(critic.backbone, "critic")
    parameters = [*backbone, critic.head.weight]
    return Trained(parameters, optimizer_for(plan, parameters))


def _head(model: Model, dtype: str, device: torch.device) -> nn.Linear:
    return nn.Linear(model.embedding_width, 1, bias=False, device=device, dtype=DTYPES[dtype])


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of a module of the same shape."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        ours.copy_(theirs)


def _frozen(module: Any) -> Any:
    return module.requires_grad_(False).eval()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
