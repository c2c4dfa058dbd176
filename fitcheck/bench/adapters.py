"""LoRA adapters by PEFT: several on one frozen base, one for each role that sits on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fitcheck.bench.precision import DTYPES, autocast_dtype
from fitcheck.bench.quantized import NF4Linear
from fitcheck.plan import Plan


class LoraNF4(LoraLinear):  # type: ignore[misc]
    """An adapter on our NF4Linear, with the casts and the copy of PEFT's own Linear4bit."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters:
            return result  # type: ignore[no-any-return]
        result = result.clone()
        convert = autocast_dtype(x.device) is None
        for name in self.active_adapters:
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            dtype = result.dtype
            if convert:
                x = x.to(lora_a.weight.dtype)
            output = lora_b(lora_a(self.lora_dropout[name](x))) * self.scaling[name]
            if convert:
                output = output.to(dtype)
            result = result + output
        return result  # type: ignore[no-any-return]


def add_adapter(plan: Plan, model: Any, name: str) -> None:
    """Freeze the model and put a LoRA adapter of that name on its linear layers.

    LoRA: arXiv 2106.09685; no dropout, which would store masks, but the 0.1 of the published runs
    that recipe hf-4.48 stands for. The adapter of the last call acts.
    """
    config = LoraConfig(
        r=plan.lora_rank,
        lora_alpha=2 * plan.lora_rank,
        lora_dropout=0.1 if plan.recipe == "hf-4.48" else 0.0,
        target_modules=_targets(plan, model),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
    )
    config._register_custom_module({NF4Linear: LoraNF4})
    with model.device, _typed_as_the_base(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a second adapter
        # of the ranks that PEFT itself gives to stacked experts, which are parameters, not modules
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern", RuntimeWarning)
        inject_adapter_in_model(config, model, adapter_name=name)
    for parameter in adapter_parameters(model, name):
        parameter.data = parameter.data.to(DTYPES[plan.adapter_precision])
    set_adapter(model, name)


@contextmanager
def _typed_as_the_base() -> Iterator[None]:
    """Within, PEFT gives new adapters the base's type on meta too, where it would leave them."""
    owner: Any = BaseTunerLayer
    real = owner._move_adapter_to_device_of_base_layer

    def move(layer: Any, name: str, device: Any = None) -> None:
        real(layer, name, device)
        _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            return
        for kind in layer.adapter_layer_names:
            adapters = getattr(layer, kind, None)
            if isinstance(adapters, nn.ModuleDict) and name in adapters:
                adapters[name].to(dtype=dtype)

    owner._move_adapter_to_device_of_base_layer = move
    try:
        yield
    finally:
        owner._move_adapter_to_device_of_base_layer = real


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one adapter."""
    named = model.named_parameters()
    return [p for path, p in named if "lora_" in path and name in path.split(".")]


def set_adapter(model: nn.Module, name: str, frozen: bool = False) -> None:
    """From now on the layers add that adapter, and only its weights train."""
    for layer in _layers(model):
        layer.set_adapter(name, inference_mode=frozen)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base."""
    for layer in _layers(model):
        layer.enable_adapters(False)
    yield
    for layer in _layers(model):
        layer.enable_adapters(True)


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _targets(plan: Plan, model: Any) -> str | list[str]:
    """The paths of the layers to adapt; a second adapter goes where the first one is."""
    adapted = [path for path, m in model.named_modules() if isinstance(m, LoraLayer)]
    if adapted:
        return adapted
    if plan.lora_targets == "all-linear":
        return "all-linear"
    if plan.lora_targets == "attention":
        return [
            f"{path}.{name}"
            for path, parent in model.named_modules()
            if "attention" in type(parent).__name__.lower()
            for name, layer in parent.named_modules()
            if isinstance(layer, (nn.Linear, Conv1D))
        ]
    return list(plan.lora_targets)
