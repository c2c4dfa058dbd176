"""Bytes of weights at each quantization, tensor by tensor.

GGUF types are ggml's blocks (ggml-common.h); which tensor gets which type in a mixture such as
Q4_K_M is llama.cpp's rule (llama_tensor_get_type in src/llama-quant.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod

from fitcheck.errors import FitCheckError
from fitcheck.layouts import LAYOUTS
from fitcheck.model import Checkpoint, Model, Weight
from fitcheck.plan import CHECKPOINT
from fitcheck.weights import has_closed_form, has_weights, weights

# ggml type -> (elements of a block, bytes of a block)
BLOCKS = {
    **{"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24)},
    **{"q5_0": (32, 22), "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18)},
    **{"q6_k": (256, 210), "q5_k": (256, 176), "q4_k": (256, 144), "iq4_xs": (256, 136)},
    **{"q3_k": (256, 110), "q2_k": (256, 84)},
}
# Rows that are no multiple of 256 cannot hold super-blocks; llama.cpp takes these instead.
FALLBACK = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "iq4_xs": "iq4_nl"}
FALLBACK |= {"q3_k": "iq4_nl", "q2_k": "iq4_nl"}
# Bytes per element of the linear weights in 16-bit checkpoints' own quantizations, scales included.
LINEAR = {
    "fp8": 1 + 4 / (128 * 128),  # fp32 scale a 128 x 128 block (DeepSeek-V3)
    "awq": 0.5 + 2.5 / 128,  # groups of 128: fp16 scale, 4-bit zero
    "gptq": 0.5 + 2.5 / 128,
    "mxfp4": 0.5 + 1 / 32,  # one 8-bit exponent a block of 32 (OCP MX)
}
PLAIN = {"bf16": 2, "fp16": 2, "fp32": 4}


@lru_cache(maxsize=1024)
def weight_bytes(model: Model, quant: str) -> int:
    """Bytes of a model's weights on the card; FitCheckError where its tensors are not known."""
    if model.checkpoint is not None and quant == CHECKPOINT:
        return model.checkpoint.bytes
    if quant in PLAIN:
        return model.params * PLAIN[quant]
    listed = quant in LINEAR or quant in ("nf4", "int8")
    if not (has_weights(model) if listed else has_closed_form(model)):
        raise FitCheckError(
            f"{model.id}: its single tensors are not known, so {quant} cannot be computed",
            "use --quant bf16, or another model",
        )
    if listed:
        return sum(_checkpoint(w, quant) * w.copies for w in weights(model))
    tied = model.tie_word_embeddings
    return sum(sum(_gguf_copies(w, model, quant, tied)) for w in weights(model))


@lru_cache(maxsize=1024)
def gguf_parts(model: Model, quant: str) -> Checkpoint:
    """Of a model as GGUF: the bytes of each layer, of its experts, of the embedding, in all.

    As its own file has them, where one was read. FitCheckError where its tensors are not known.
    """
    if model.checkpoint is not None and quant == CHECKPOINT:
        return model.checkpoint
    if not has_closed_form(model):
        raise FitCheckError(
            f"{model.id}: its single tensors are not known, so {quant} cannot be computed",
            "name a GGUF file of it instead: fitcheck check model.gguf",
        )
    layers, experts = [0] * model.num_layers, [0] * model.num_layers
    tied, embedding = model.tie_word_embeddings, 0
    for weight in weights(model):
        sizes = _gguf_copies(weight, model, quant, tied)
        if weight.kind == "embedding" and not tied:
            embedding = sum(sizes)
        if weight.kind in ("embedding", "position", "head", "tower") or weight.copies == 1:
            continue
        sparse = model.moe is not None and weight.copies == model.moe.moe_layers
        first = model.num_layers - weight.copies if sparse else 0
        many = max(1, weight.copies // model.num_layers)  # StableLM has a norm a head
        for copy, size in enumerate(sizes):
            layer = first + copy // many
            layers[layer] += size
            experts[layer] += size if weight.kind == "expert" else 0
    total = weight_bytes(model, quant)
    mixture = tuple(experts) if any(experts) else ()
    return Checkpoint("gguf", total, ((quant, total),), quant, tuple(layers), mixture, embedding)


def _checkpoint(weight: Weight, quant: str) -> int:
    """One tensor: block linears (experts too, where the format has them) quantized, else 16 bit."""
    elements = prod(weight.shape)
    if weight.kind not in ("linear", "expert"):
        return 2 * elements
    if quant == "nf4":  # bitsandbytes leaves stacked experts alone
        if weight.kind == "expert":
            return 2 * elements
        scales = -(-elements // 64)
        return -(-elements // 2) + scales + 4 * -(-scales // 256)
    if quant == "int8":
        return 2 * elements if weight.kind == "expert" else elements + 4 * weight.shape[0]
    return round(elements * LINEAR[quant])


def _gguf_copies(weight: Weight, model: Model, quant: str, tied: bool) -> list[int]:
    """Each copy of one tensor in a GGUF file, from the first layer to the last."""
    elements = prod(weight.shape)
    if quant in PLAIN:
        return [elements * PLAIN[quant]] * weight.copies
    if weight.kind in ("norm", "bias", "router", "other") or len(weight.shape) < 2:
        return [4 * elements] * weight.copies
    if weight.kind == "tower":
        return [2 * elements] * weight.copies
    row = weight.shape[0] if LAYOUTS[model.model_type].conv1d else weight.shape[-1]
    kind = _part(weight, model, tied)
    type_of = MIXTURES.get(quant)
    if type_of is None:
        used = "q6_k" if kind == "output" and quant in ("q4_0", "q4_1", "q5_0", "q5_1") else quant
        return [_size(elements, row, used)] * weight.copies
    heads = (model.num_attention_heads or 1) // (model.num_key_value_heads or 1)
    return [
        _size(elements, row, type_of(kind, layer, weight.copies, heads))
        for layer in range(weight.copies)
    ]


def _size(elements: int, row: int, kind: str) -> int:
    per, size = BLOCKS[kind]
    if row % per:
        kind = FALLBACK.get(kind, "f16")
        per, size = BLOCKS[kind]
        if row % per:
            per, size = BLOCKS["f16"]
    return elements // per * size


def _part(weight: Weight, model: Model, tied: bool) -> str:
    """What llama.cpp's rule calls this tensor: output, embedding, v, out, down, or other."""
    layout, leaf = LAYOUTS[model.model_type], weight.name.rpartition(".")[2]
    if weight.kind == "head" or (weight.kind == "embedding" and tied):
        return "output"
    if weight.kind == "embedding":
        return "embedding"
    if weight.name.startswith(layout.attention):
        if leaf == layout.out:
            return "out"
        return {"v_proj": "v"}.get(leaf, "qkv" if len(layout.qkv) == 1 else "other")
    return "down" if leaf == layout.down else "other"


def _more(layer: int, layers: int) -> bool:
    """use_more_bits: the first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _q4_k_m(part: str, layer: int, layers: int, heads: int) -> str:
    if part == "output":
        return "q6_k"
    if part in ("v", "down"):
        return "q6_k" if _more(layer, layers) else "q4_k"
    return "q5_k" if part == "qkv" else "q4_k"


def _q4_k_s(part: str, layer: int, layers: int, heads: int) -> str:
    if part == "output":
        return "q6_k"
    if part == "v" and layer < 4:
        return "q5_k"
    return "q5_k" if part == "down" and layer < layers // 8 else "q4_k"


def _q5_k_m(part: str, layer: int, layers: int, heads: int) -> str:
    if part == "output" or part == "qkv":
        return "q6_k"
    return "q6_k" if part in ("v", "down") and _more(layer, layers) else "q5_k"


def _q5_k_s(part: str, layer: int, layers: int, heads: int) -> str:
    return "q6_k" if part == "output" else "q5_k"


def _q3_k(v: str, down: Callable[[int, int], str], out: str) -> Callable[[str, int, int, int], str]:
    def rule(part: str, layer: int, layers: int, heads: int) -> str:
        if part == "output":
            return "q6_k"
        if part == "v":
            return "q5_k" if v == "m" and layer < 2 else {"m": "q4_k", "l": "q5_k", "s": "q3_k"}[v]
        if part == "down":
            return down(layer, layers)
        if part == "qkv":
            return "q4_k" if v in "ml" else "q3_k"
        return out if part == "out" else "q3_k"

    return rule


def _q2_k(part: str, layer: int, layers: int, heads: int) -> str:
    if part == "output":
        return "q6_k"
    if part == "v":
        return "q4_k" if heads >= 4 else "q3_k"
    return "q3_k" if part in ("down", "out") else "q2_k"


def _iq4(base: str) -> Callable[[str, int, int, int], str]:
    """With an importance matrix; without one, `down` of the first eighth is q5_k."""

    def rule(part: str, layer: int, layers: int, heads: int) -> str:
        if part == "output":
            return "q6_k"
        return "q5_k" if part == "v" and heads >= 4 else base

    return rule


MIXTURES: dict[str, Callable[[str, int, int, int], str]] = {
    "q4_k_m": _q4_k_m,
    "q4_k_s": _q4_k_s,
    "q5_k_m": _q5_k_m,
    "q5_k_s": _q5_k_s,
    "q3_k_l": _q3_k("l", lambda layer, layers: "q5_k", "q5_k"),
    "q3_k_m": _q3_k("m", lambda layer, layers: "q5_k" if layer < layers // 16 else "q4_k", "q4_k"),
    "q3_k_s": _q3_k("s", lambda layer, layers: "q3_k", "q3_k"),
    "q2_k": _q2_k,
    "iq4_xs": _iq4("iq4_xs"),
    "iq4_nl": _iq4("iq4_nl"),
}
