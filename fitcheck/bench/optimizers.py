"""Plan -> an optimizer over some parameters, with the allocations that it makes on a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from fitcheck.plan import Plan

LEARNING_RATE = 1e-5  # of no account for memory; a caller who wants to learn sets the group's "lr"


class Optimizer(Protocol):
    """What a step asks of an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


def optimizer_for(plan: Plan, parameters: list[nn.Parameter]) -> Optimizer:
    """The plan's optimizer over these parameters; weight decay 0 everywhere."""
    make = _MAKERS[plan.optimizer]
    if plan.precision == "bf16-master":
        return MasterWeights(parameters, make)
    return make(parameters)


class MasterWeights:
    """fp32 copies of 16-bit weights that the inner optimizer trains, as DeepSpeed and Megatron do.

    The gradients of all parameters are copied to fp32 at once, and freed after the step.
    """

    def __init__(
        self, parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], Optimizer]
    ) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(p.detach().float()) for p in parameters]
        self.inner = make(self.masters)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        for weight, master in zip(self.parameters, self.masters, strict=True):
            master.grad = weight.grad.float() if weight.grad is not None else None
        self.inner.step()
        for weight, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None
            weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.parameters:
            weight.grad = None


class MetaFusedAdamW(torch.optim.Optimizer):
    """What AdamW(fused=True) allocates; torch refuses it on meta tensors.

    Two states and a step counter on the card for each parameter, at the first step; the kernel
    itself takes nothing.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None or self.state[parameter]:
                continue
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, foreach=True)


def _adamw_fused(parameters: list[nn.Parameter]) -> Optimizer:
    if parameters[0].is_meta:
        return MetaFusedAdamW(parameters, LEARNING_RATE)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, foreach=True)


_MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": _adamw,
    "adamw-fused": _adamw_fused,
    "sgd": _sgd,
}
