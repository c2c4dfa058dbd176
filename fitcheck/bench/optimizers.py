"""Plan -> an optimizer over some parameters, with the allocations that it makes on a card.

Optimizers made of torch's operators run anywhere. Those that are one kernel for each parameter
(fused AdamW, bitsandbytes') have stand-ins here where the kernel cannot run: the same states, and
on `meta` nothing else, since such a kernel takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fitcheck.bench.blockwise import (
    BLOCK_8BIT,
    blocks,
    dequantize_blocks,
    dynamic_code,
    quantize_blocks,
)
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan

LEARNING_RATE = 1e-5  # of no account for memory; a caller who wants to learn sets each group's "lr"
BETAS, EPSILON = (0.9, 0.999), 1e-8
LEAST_8BIT = 4096  # elements; smaller tensors have fp32 states: bitsandbytes' min_8bit_size
LEAST_PAGED = 100_000  # elements; smaller states are not paged: bitsandbytes' get_state_buffer


class Optimizer(Protocol):
    """What a step asks of an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


Maker = Callable[[list[nn.Parameter]], Optimizer]


def optimizer_for(plan: Plan, parameters: list[nn.Parameter]) -> Optimizer:
    """The plan's optimizer over these parameters; weight decay 0 everywhere."""
    make = _MAKERS[plan.optimizer] if plan.optimizer != "muon" else _muon_for(plan)
    if plan.precision == "bf16-master":
        make = _with_masters(make)
    if "optimizer" in plan.offload:
        return HostOptimizer(parameters, make)
    return make(parameters)


class _Copies:
    """An inner optimizer that trains copies of the weights."""

    def __init__(self, parameters: list[nn.Parameter], copies: list[nn.Parameter], make: Maker):
        self.parameters, self.copies = parameters, copies
        self.inner = make(copies)
        self.param_groups = self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.parameters:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for weight, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = self.gradient(weight.grad)
        self.inner.step()
        for weight, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = None
            weight.copy_(copy)

    def gradient(self, gradient: Tensor | None) -> Tensor | None:
        """A weight's gradient as that of its copy."""
        raise NotImplementedError


class MasterWeights(_Copies):
    """fp32 copies of 16-bit weights are what trains, as in DeepSpeed and Megatron.

    The gradients of all parameters are copied to fp32 at once, and freed after the step.
    """

    def __init__(self, parameters: list[nn.Parameter], make: Maker) -> None:
        super().__init__(parameters, [nn.Parameter(p.detach().float()) for p in parameters], make)

    def gradient(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.float()


class HostOptimizer(_Copies):
    """States and update in RAM: gradients go there, weights come back. On meta there is no RAM."""

    def __init__(self, parameters: list[nn.Parameter], make: Maker) -> None:
        if parameters[0].is_meta:
            self.parameters, self.param_groups = parameters, []
        else:
            copies = [nn.Parameter(p.detach().to("cpu", copy=True)) for p in parameters]
            super().__init__(parameters, copies, make)

    def step(self) -> None:
        if not self.parameters[0].is_meta:
            super().step()

    def gradient(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.to("cpu")


class Together:
    """Several optimizers, each with parameters of its own."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


class _Kernel:
    """An optimizer whose update of a parameter is one kernel, which takes no memory."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": LEARNING_RATE}]
        self.state: dict[nn.Parameter, dict[str, Any]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter not in self.state:
                self.state[parameter] = {**self.states(parameter), "steps": 0}
            state = self.state[parameter]
            state["steps"] += 1
            if not parameter.is_meta:
                self.update(parameter, parameter.grad.float(), state, group["lr"])

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept for a parameter from its first update on."""
        raise NotImplementedError

    def update(self, weight: nn.Parameter, gradient: Tensor, state: Any, lr: float) -> None:
        """The update in plain operators, where there is no such kernel."""
        raise NotImplementedError


class MetaFusedAdamW(_Kernel):
    """AdamW(fused=True), which torch refuses on meta: two states, and a counter on the card."""

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


class AdamW8bit(_Kernel):
    """bitsandbytes' AdamW8bit: states of one byte and an fp32 maximum for each 256 of them.

    paged: the large states are in memory that CUDA moves between RAM and card, outside of the
    allocator; on meta they are not there.
    """

    def __init__(self, parameters: list[nn.Parameter], paged: bool = False) -> None:
        super().__init__(parameters)
        self.paged = paged

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        count = parameter.numel()
        if count < LEAST_8BIT:
            return {m: torch.zeros_like(parameter, dtype=torch.float32) for m in ("m", "v")}
        state = {
            f"{m}_max": torch.zeros(blocks(count, BLOCK_8BIT), device=parameter.device)
            for m in ("m", "v")
        }
        if not (self.paged and parameter.is_meta and count >= LEAST_PAGED):
            state |= {m: torch.zeros_like(parameter, dtype=torch.uint8) for m in ("m", "v")}
        return state

    def update(self, weight: nn.Parameter, gradient: Tensor, state: Any, lr: float) -> None:
        moments = []
        for m, beta, x in zip(("m", "v"), BETAS, (gradient, gradient**2), strict=True):
            code = dynamic_code(signed=m == "m")
            small = state[m].dtype == torch.float32
            moment = state[m]
            if not small:
                flat = dequantize_blocks(moment.flatten(), state[f"{m}_max"], code, BLOCK_8BIT)
                moment = flat.view(gradient.shape)
            moment = moment.lerp(x, 1 - beta)
            moments.append(moment)
            if small:
                state[m].copy_(moment)
            else:
                indices, maxima = quantize_blocks(moment, code, BLOCK_8BIT)
                state[m].copy_(indices.view(gradient.shape))
                state[f"{m}_max"].copy_(maxima)
        correction = [1 - beta ** state["steps"] for beta in BETAS]
        spread = (moments[1] / correction[1]).sqrt() + EPSILON
        weight.sub_((lr / correction[0] * moments[0] / spread).to(weight.dtype))


class Lion(_Kernel):
    """bitsandbytes' Lion (arXiv 2302.06675): one fp32 state, whatever type the weight has."""

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(parameter, dtype=torch.float32)}

    def update(self, weight: nn.Parameter, gradient: Tensor, state: Any, lr: float) -> None:
        direction = state["m"].lerp(gradient, 0.1).sign()
        weight.sub_((lr * direction).to(weight.dtype))
        state["m"].lerp_(gradient, 0.01)


def _with_masters(make: Maker) -> Maker:
    return lambda parameters: MasterWeights(parameters, make)


def _adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, foreach=True)


def _adamw_fused(parameters: list[nn.Parameter]) -> Optimizer:
    if parameters[0].is_meta:
        return MetaFusedAdamW(parameters)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, foreach=True)


def _adafactor(parameters: list[nn.Parameter]) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(  # type: ignore[no-any-return]
        parameters, lr=LEARNING_RATE, scale_parameter=False, relative_step=False
    )


def _muon_for(plan: Plan) -> Maker:
    """Muon for the matrices inside the blocks, AdamW for embeddings, heads and the rest."""
    models = (plan.model, plan.reward_architecture, plan.critic_architecture)
    tables = {1, *(model.vocab_size for model in models if model is not None)}

    def muon(parameters: list[nn.Parameter]) -> Optimizer:
        matrices = [p for p in parameters if p.ndim == 2 and p.shape[0] not in tables]
        chosen = set(map(id, matrices))
        rest = [p for p in parameters if id(p) not in chosen]
        first = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.0)
        return Together([first, _adamw(rest)] if rest else [first])

    return muon


def _adamw_8bit(parameters: list[nn.Parameter]) -> Optimizer:
    bnb = _bitsandbytes(parameters)
    return bnb.AdamW8bit(parameters, **_PLAIN) if bnb else AdamW8bit(parameters)


def _paged_adamw_8bit(parameters: list[nn.Parameter]) -> Optimizer:
    bnb = _bitsandbytes(parameters)
    return bnb.PagedAdamW8bit(parameters, **_PLAIN) if bnb else AdamW8bit(parameters, paged=True)


def _lion(parameters: list[nn.Parameter]) -> Optimizer:
    bnb = _bitsandbytes(parameters)
    return bnb.Lion(parameters, **_PLAIN) if bnb else Lion(parameters)


_PLAIN = {"lr": LEARNING_RATE, "weight_decay": 0.0}


def _bitsandbytes(parameters: list[nn.Parameter]) -> Any:
    """Its optimizers, for parameters on a card; None elsewhere."""
    if not parameters[0].is_cuda:
        return None
    try:
        import bitsandbytes.optim as optim
    except ImportError:
        raise FitCheckError(
            "this optimizer on a card needs bitsandbytes", "pip install bitsandbytes"
        ) from None
    return optim


_MAKERS: dict[str, Maker] = {
    "adamw": _adamw,
    "adamw-fused": _adamw_fused,
    "adamw-8bit": _adamw_8bit,
    "paged-adamw-8bit": _paged_adamw_8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
}
