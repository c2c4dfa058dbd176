"""An architecture that no formula covers: its tensors, from transformers' own class on meta.

`python -m fitcheck.bench understand` reads {"name", "config"} and prints the row. Only classes that
transformers ships are built: `auto_map` and everything else that names code is left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fitcheck.errors import FitCheckError

LEFT_OUT = ("auto_map", "quantization_config", "torch_dtype", "dtype", "_name_or_path")
MOST_LAYERS = 512  # each is a module of its own; the deepest known has 126


def row_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The row of a model, its tensors listed from the class; FitCheckError where there is none."""
    kind = config.get("model_type")
    fields = {k: v for k, v in config.items() if k not in LEFT_OUT and k != "model_type"}
    try:
        whole = AutoConfig.for_model(str(kind), **fields)
    except ValueError as fault:
        raise _cannot(name, f"transformers {transformers.__version__} has no {kind!r}") from fault
    text = whole.get_text_config()
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise _cannot(name, f"{kind} is no language model that writes")
    layers = getattr(text, "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise _cannot(name, f"it has {layers!r} layers"[:80])
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16)
    params = sum(p.numel() for p in module.parameters())
    tensors = listed(module)
    heads = text.num_attention_heads
    own = {k: v for k, v in text.to_dict().items() if k not in LEFT_OUT and _is_json(v)}
    return {
        **{"id": name, "family": name, "name": name, "model_type": str(kind), "status": "config"},
        "sources": [f"config.json, transformers {transformers.__version__}"],
        "checked": f"meta-instantiated {params} params ({type(module).__name__})",
        **{"params": params, "params_embedding": module.get_input_embeddings().weight.numel()},
        **{"hidden_size": text.hidden_size, "num_layers": layers, "num_attention_heads": heads},
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "intermediate_size": _width(text, tensors),
        **{"vocab_size": text.vocab_size, "attention": {"kind": "as its class has it"}},
        "tie_word_embeddings": module.get_output_embeddings().weight
        is module.get_input_embeddings().weight,
        "max_position_embeddings": getattr(text, "max_position_embeddings", None),
        "attention_bias": {"qkv": False, "out": False},
        **{"mlp_bias": False, "lm_head_bias": False, "qk_norm": False, "mlp_gated": False},
        "architecture_class": type(module).__name__,
        **{"hybrid": own, "tensors": tensors},
    }


def listed(module: nn.Module) -> list[list[Any]]:
    """[name, shape, copies, kind] of each parameter, alike ones of all layers together."""
    modules, found = dict(module.named_modules()), Counter[tuple[str, tuple[int, ...], str]]()
    for name, parameter in module.named_parameters():
        place, _, leaf = name.rpartition(".")
        short = re.sub(r"^(?:model|transformer|backbone)\.", "", place)
        short = re.sub(r"\.\d+(?=\.|$)", "", re.sub(r"^(?:layers|h|blocks)\.\d+\.", "", short))
        short = short if leaf == "weight" else f"{short}.{leaf}"
        found[short, tuple(parameter.shape), _kind(name, leaf, parameter, modules[place])] += 1
    return [[name, list(shape), copies, kind] for (name, shape, kind), copies in found.items()]


def _kind(name: str, leaf: str, parameter: nn.Parameter, owner: nn.Module) -> str:
    if re.search(r"(?:^|\.)(?:lm_head|embed_out)\.", name):
        return "head"
    if isinstance(owner, nn.Embedding):
        return "position" if "pos" in name else "embedding"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if leaf == "bias":
        return "bias"
    if isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D":
        return "linear"
    return "expert" if "expert" in name and parameter.ndim == 3 else "other"


def _width(text: Any, tensors: list[list[Any]]) -> int:
    stated = getattr(text, "intermediate_size", None)
    sides = [max(shape) for _, shape, _, kind in tensors if kind == "linear"]
    return stated if type(stated) is int else max(sides)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return value is not None


def _cannot(name: str, why: str) -> FitCheckError:
    return FitCheckError(
        f"{name}: its architecture is not understood: {why}",
        "choose a model that `fitcheck models` lists, or one built like it",
    )
