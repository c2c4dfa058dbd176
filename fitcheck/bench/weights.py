"""Real weights for a measurement: a folder or a Hub id, in place of random ones.

Memory and speed do not depend on the values; who wants to see them all the same may. Only
safetensors are read, and no code that comes with a model runs.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from fitcheck.bench.roles import Roles
from fitcheck.errors import FitCheckError


def load_weights(built: Roles, source: str) -> None:
    """Give the policy (and its reference) the weights of that folder or Hub id.

    FitCheckError where they cannot be read, or are not of the plan's model.
    """
    plan = built.plan
    if plan.tuning == "qlora" or plan.method == "reward":
        raise FitCheckError(
            "--weights is for a language model in 16 or 32 bits",
            "leave it out: memory and speed do not depend on the values",
        )
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as fault:
        raise FitCheckError(
            f"the weights of {source} cannot be read: {str(fault).splitlines()[0]}",
            "a folder with config.json and safetensors, or the id of a model on the Hub",
        ) from fault
    for module in (built.policy, built.reference):
        if module is not None:
            _copy(loaded, module, source)


@torch.no_grad()
def _copy(loaded: torch.nn.Module, module: torch.nn.Module, source: str) -> None:
    ours = {name.replace(".base_layer", ""): p for name, p in module.named_parameters()}
    for name, theirs in loaded.named_parameters():
        mine = ours.get(name)
        if mine is None or mine.shape != theirs.shape:
            raise FitCheckError(
                f"{source} is not the plan's model: it has {name} {list(theirs.shape)}",
                "name the model whose weights these are",
            )
        mine.copy_(theirs)
