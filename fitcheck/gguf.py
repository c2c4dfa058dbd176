"""A GGUF file's header: its metadata and its table of tensors, as a Model.

    model = gguf_model([(data, size, name)])         # one of each split, in order

The format is ggml's (docs/gguf.md there), versions 2 and 3, little-endian. Untrusted input: every
count, length and offset is checked before it is followed; strings of a vocabulary are skipped.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from fitcheck.checkpoint import Tensor, corrupt, half, summary
from fitcheck.config import model_from
from fitcheck.errors import FitCheckError
from fitcheck.layouts import LAYOUTS, LLAMA
from fitcheck.model import Model

# ggml type -> (name, elements of a block, bytes of a block), ggml-common.h and ggml.c
TYPES = {
    **{0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20)},
    **{6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36)},
    **{10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144)},
    **{13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292)},
    **{16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98)},
    **{19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110)},
    **{22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2)},
    **{26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("f64", 1, 8), 29: ("iq1_m", 256, 56)},
    **{30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17)},
    **{40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18)},
}
# general.architecture -> model_type, where they are not the same word
ARCHITECTURES = {
    **{"gptneox": "gpt_neox", "phi2": "phi", "command-r": "cohere", "gpt-oss": "gpt_oss"},
    **{"starcoder": "gpt_bigcode", "gemma3": "gemma3_text", "qwen2moe": "qwen2_moe"},
    **{"qwen3moe": "qwen3_moe", "deepseek2": "deepseek_v3", "glm4moe": "glm4_moe"},
    **{"ernie4_5-moe": "ernie4_5_moe", "hunyuan-dense": "hunyuan_v1_dense", "seed-oss": "seed_oss"},
    **{"hunyuan-moe": "hunyuan_v1_moe", "minimax-m2": "minimax_m2", "exaone-moe": "exaone_moe"},
    **{"qwen2vl": "qwen2", "qwen3vl": "qwen3", "qwen3vlmoe": "qwen3_moe", "mistral3": "mistral"},
}
# ... of hybrids, which are understood as the catalog's row of the same sizes
ARCHITECTURES |= {"qwen3next": "qwen3_next", "falcon-h1": "falcon_h1", "kimi-linear": "kimi_linear"}
ARCHITECTURES |= {"granitehybrid": "granitemoehybrid", "nemotron_h_moe": "nemotron_h"}
ARCHITECTURES |= {"qwen35": "qwen3_5", "qwen35moe": "qwen3_5_moe", "lfm2moe": "lfm2_moe"}
ARCHITECTURES |= {"gemma3n": "gemma3n_text", "glm-dsa": "glm_moe_dsa"}
FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
FORMATS |= {11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
LONGEST = 2**28  # bytes of a header; real ones, with their vocabulary, take about 2**24
MOST_KEYS, MOST_TENSORS, MOST_ITEMS = 2**14, 2**17, 2**24
KEPT = 4096  # items of an array that are kept; a vocabulary is only counted


class Header:
    """A position in a file that never leaves it."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.at, self.name = data, 0, name
        self.end = min(len(data), LONGEST)

    def skip(self, count: int) -> int:
        """Move on by so many bytes; where they began."""
        if count > self.end - self.at:
            if self.end == LONGEST:
                raise corrupt(self.name, "its header is too long")
            raise half(self.name)
        self.at += count
        return self.at - count

    def number(self, kind: int) -> Any:
        at = self.skip(FIXED[kind])
        return struct.unpack_from(FORMATS[kind], self.data, at)[0]

    def count(self, most: int, what: str) -> int:
        found: int = self.number(10)
        if found > most:
            raise corrupt(self.name, f"it claims {found:,} {what}")
        return found

    def text(self, most: int = LONGEST) -> str:
        length = self.count(most, "bytes in a name")
        at = self.skip(length)
        return bytes(self.data[at : at + length]).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value; of an array its items, or how many there are where they are many or texts."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            if kind not in FIXED:
                raise corrupt(self.name, f"it has a value of type {kind}")
            return self.number(kind)
        item, count = self.number(4), self.count(MOST_ITEMS, "items of an array")
        if item in FIXED:
            if count <= KEPT:
                return [self.number(item) for _ in range(count)]
            self.skip(count * FIXED[item])
        elif item == STRING:
            for _ in range(count):
                self.skip(self.count(LONGEST, "bytes in a text"))
        elif item == ARRAY and depth < 2:
            for _ in range(count):
                self.value(ARRAY, depth + 1)
        else:
            raise corrupt(self.name, f"it has an array of type {item}")
        return count


def gguf_header(data: Any, size: int, name: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata and tensors of one file; data: its bytes, or as many as are mapped.

    FitCheckError where it is no GGUF file, is damaged, or shorter than its table says.
    """
    header = Header(data, name)
    magic = bytes(data[:8])
    if magic == b"version ":
        raise FitCheckError(f"{name} is a Git LFS pointer, not the file itself", "git lfs pull")
    if magic[:4] != b"GGUF":
        raise corrupt(name, "it is no GGUF file")
    header.skip(4)
    version = header.number(4)
    if version not in (2, 3):
        raise FitCheckError(
            f"{name} is GGUF of version {version}, or of a big-endian machine",
            "versions 2 and 3 are understood; convert it anew with llama.cpp",
        )
    tensors, keys = header.count(MOST_TENSORS, "tensors"), header.count(MOST_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = header.text(2**16)
        metadata[key] = header.value(header.number(4))
    rows = [_row(header) for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 1 <= align <= 2**16:
        raise corrupt(name, f"its alignment is {align!r}"[:80])
    start = -(-header.at // align) * align
    if any(start + offset + tensor.bytes > size for tensor, offset in rows):
        raise half(name)
    return metadata, [tensor for tensor, _ in rows]


def _row(header: Header) -> tuple[Tensor, int]:
    name, dimensions = header.text(2**10), header.number(4)
    if dimensions > 4:
        raise corrupt(header.name, f"a tensor has {dimensions} dimensions")
    sizes = tuple(header.count(2**40, "elements in a row") for _ in range(dimensions))
    kind, offset = header.number(4), header.number(10)
    if kind not in TYPES:
        raise corrupt(header.name, f"a tensor is of type {kind}, which is not known")
    label, block, width = TYPES[kind]
    if (sizes and sizes[0] % block) or prod(sizes) > 2**50:
        raise corrupt(header.name, f"a row of {name[:60]!r} is not whole blocks of {label}")
    return Tensor(name, label, sizes, prod(sizes) // block * width), offset


def gguf_model(metadata: Mapping[str, Any], tensors: Sequence[Tensor], name: str) -> Model:
    """The Model of a file's metadata and of the tensors of all its splits.

    FitCheckError where the architecture is not understood.
    """
    config = config_of(metadata, tensors, name)
    model = model_from(config, name, f"the header of {name}")
    found = summary(list(tensors), "gguf", model.num_layers, _quantization(tensors))
    count = sum(prod(t.shape) for t in tensors if _is_parameter(t.name, model))
    checked = "the tensors in the file have as many parameters as the closed form"
    model = replace(model, checkpoint=found)
    if towers := model.params_vision_audio:  # they are a file of their own (mmproj)
        own = tuple(t for t in model.tensors or () if t.kind != "tower") or None
        model = replace(model, params=model.params - towers, params_vision_audio=None, tensors=own)
    if count == model.params:
        return replace(model, status="headers", checked=checked)
    note = f"the file has {count:,} parameters, the closed form {model.params:,}"
    return replace(model, status="mismatch", note=note)


def _is_parameter(name: str, model: Model) -> bool:
    """Whether transformers counts this tensor; not tables of frequencies, nor prediction blocks."""
    if "exp_probs_b" in name and not LAYOUTS.get(model.model_type, LLAMA).router_bias:
        return False  # a buffer there
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer and int(layer[1]) >= model.num_layers:
        return False
    return name.startswith(("blk.", "token_embd", "output", "position_embd"))


def _quantization(tensors: Sequence[Tensor]) -> str:
    """The types of the matrices, the largest first: q4_k + q6_k."""
    sizes: dict[str, int] = {}
    for t in tensors:
        if len(t.shape) > 1:
            sizes[t.dtype] = sizes.get(t.dtype, 0) + t.bytes
    return " + ".join(sorted(sizes, key=lambda kind: -sizes[kind])[:4])


def config_of(metadata: Mapping[str, Any], tensors: Sequence[Tensor], name: str) -> dict[str, Any]:
    """What a config.json would say, from llama.cpp's names of the same sizes."""
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str):
        raise corrupt(name, "it names no architecture")
    if kind == "clip":
        raise FitCheckError(
            f"{name} holds only the part that sees (mmproj)", "check the language model's file"
        )
    shapes = {t.name: t.shape for t in tensors}

    def own(key: str) -> Any:
        return metadata.get(f"{kind}.{key}")

    layers, spare = own("block_count"), own("nextn_predict_layers") or 0
    if type(layers) is not int or type(spare) is not int:
        raise corrupt(name, "it does not say how many layers it has")
    heads, kv = _one(own("attention.head_count")), _one(own("attention.head_count_kv"))
    experts, latent = own("expert_count") or 0, own("attention.kv_lora_rank")
    inner = _one(own("feed_forward_length"))
    embedding = shapes.get("token_embd.weight", (0, 0))
    config: dict[str, Any] = {
        **{"model_type": ARCHITECTURES.get(kind, kind), "num_hidden_layers": layers - spare},
        **{"hidden_size": own("embedding_length"), "num_attention_heads": heads},
        **{"n_head": heads, "n_layer": layers - spare, "n_embd": own("embedding_length")},
        **{"num_key_value_heads": kv or heads, "head_dim": own("attention.key_length")},
        **{"intermediate_size": inner, "n_inner": inner, "ffn_dim": inner},
        **{"max_position_embeddings": own("context_length")},
        **{"n_positions": own("context_length"), "vocab_size": embedding[-1]},
        **{"tie_word_embeddings": "output.weight" not in shapes},
        **{"attention_bias": any(f"blk.0.attn_{q}.bias" in shapes for q in ("q", "qkv"))},
        **{"attention_out_bias": "blk.0.attn_output.bias" in shapes},
        **{"mlp_bias": "blk.0.ffn_down.bias" in shapes},
        **{"use_qk_norm": "blk.0.attn_q_norm.weight" in shapes},
        **{"lm_head_bias": "output.bias" in shapes},
    }
    if kind == "llama" and experts:
        config["model_type"] = "mixtral"
    if window := own("attention.sliding_window"):
        config["sliding_window"] = window
        config["use_sliding_window"] = True
    elif kind in ("llama", "phi3", "qwen2", "qwen3"):
        config["sliding_window"] = None
    if experts:
        shared = own("expert_shared_feed_forward_length") if kind == "qwen2moe" else None
        config |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
        config |= dict.fromkeys(("num_experts_per_tok", "moe_k"), own("expert_used_count"))
        config |= {
            **{"moe_num_experts": experts, "moe_topk": own("expert_used_count")},
            **{"moe_intermediate_size": own("expert_feed_forward_length") or inner},
            **{"n_shared_experts": own("expert_shared_count") or 0},
            **{"num_shared_experts": own("expert_shared_count") or 0},
            **{"moe_num_shared_experts": own("expert_shared_count") or 0},
            **{"shared_expert_intermediate_size": shared},
            **{"first_k_dense_replace": own("leading_dense_block_count") or 0},
            **{"num_dense_layers": own("leading_dense_block_count") or 0},
            **{"moe_layer_start_index": own("leading_dense_block_count") or 0},
        }
    if latent:
        rope = own("rope.dimension_count")
        key = own("attention.key_length_mla") or own("attention.key_length")
        value = own("attention.value_length_mla") or own("attention.value_length")
        if not all(type(n) is int for n in (rope, key, value)):
            raise corrupt(name, "it does not say how wide a head is")
        config |= {"kv_lora_rank": latent, "q_lora_rank": own("attention.q_lora_rank")}
        config |= {"qk_rope_head_dim": rope, "qk_nope_head_dim": key - rope, "v_head_dim": value}
        config["num_key_value_heads"] = heads
    return config


def _one(value: Any) -> Any:
    """A size that some files state for each layer: the largest of them."""
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return max(value)
    return value
