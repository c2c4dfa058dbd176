"""What earlier versions of transformers kept alive, done to the modules of this one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fitcheck.plan import Plan


def keep_presents(plan: Plan, model: nn.Module) -> None:
    """gpt_bigcode of transformers 4.48 left use_cache on under checkpointing.

    Each layer's fused projection, of which keys and values are a view, stays as long as the logits
    do (modeling_gpt_bigcode.py 4.48.1, lines 314, 328 and 1006).
    """
    if (plan.recipe, plan.model.model_type) != ("hf-4.48", "gpt_bigcode") or not plan.checkpointing:
        return
    kept: list[Tensor] = []

    def projected(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:  # not when backward runs the layer again
            kept.append(output)

    def returned(_module: nn.Module, _inputs: Any, output: Any) -> None:
        output.logits.presents = tuple(kept)
        kept.clear()

    for name, module in model.named_modules():
        if name.endswith(".c_attn"):
            module.register_forward_hook(projected)
    model.register_forward_hook(returned)


def widen_norms(plan: Plan, model: nn.Module) -> None:
    """TRL up to 0.13 left the norms of a 4-bit base in fp32, and with them the residual stream.

    prepare_model_for_kbit_training makes all that is not quantized fp32; then TRL casts embeddings
    and head back to 16 bits (trl/trainer/utils.py 0.13.0, peft_module_casting_to_bf16).
    """
    if (plan.recipe, plan.tuning, plan.precision) == ("hf-4.48", "qlora", "bf16-mixed"):
        for name, module in model.named_modules():
            if "norm" in name.rpartition(".")[2]:
                module.float()
