"""Small checkpoints, written byte by byte: what the readers are tried on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fitcheck.checkpoint import BITS
from fitcheck.config import model_from
from fitcheck.weights import weights

LLAMA: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    **{"max_position_embeddings": 8192, "tie_word_embeddings": False},
}
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def safetensors(shapes: Shapes, missing: int = 0) -> bytes:
    """A file with these tensors, all zeros; `missing` bytes short of its end."""
    header, end = dict[str, Any](), 0
    for name, (dtype, shape) in shapes.items():
        size = BITS[dtype] // 8
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end - missing)


def tensors_of(config: Mapping[str, Any], dtype: str = "BF16") -> dict[str, Any]:
    """Names, types and shapes of a dense model's tensors, a layer at a time."""
    found = {}
    for weight in weights(model_from(config, "tiny")):
        name = weight.name if weight.name.endswith(".bias") else f"{weight.name}.weight"
        layered = weight.copies > 1 or config["num_hidden_layers"] == 1
        for layer in range(weight.copies):
            place = f"model.layers.{layer}.{name}" if layered else f"model.{name}"
            found["lm_head.weight" if weight.kind == "head" else place] = (dtype, weight.shape)
    return found


def folder(config: Mapping[str, Any], **more: bytes) -> dict[str, bytes]:
    """The files of a repository: config.json, model.safetensors."""
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors(tensors_of(config)),
        **more,
    }
