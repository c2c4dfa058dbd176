"""The headers of safetensors files, and what they say of a model: its bytes, as they really are.

    tensors = safetensors_header(read, name)         # read(offset, length) -> bytes
    model = weighed(model, tensors, config)          # status `headers` if they agree

Untrusted input: a header is bounded, its shapes are checked against its offsets and the file's
size, and nothing but JSON is parsed. Pickled checkpoints (.bin, .pt) are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from fitcheck.errors import FitCheckError
from fitcheck.model import Checkpoint, Model

LONGEST_HEADER = 25_000_000  # bytes; what huggingface_hub reads (SAFETENSORS_MAX_HEADER_LENGTH)
# Bits of each type of safetensors (safetensors/src/tensor.rs).
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8}
BITS |= {"F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16}
BITS |= {"F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64}
BITS |= {"I64": 64, "U64": 64}

Read = Callable[[int, int], bytes]


class Tensor(NamedTuple):
    """One tensor of a file: its shape as stored, its bytes there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def safetensors_header(read: Read, name: str, size: int | None = None) -> list[Tensor]:
    """The tensors of one safetensors file, `size` bytes long where that is known.

    FitCheckError where it is none, is damaged, or shorter than its own header says.
    """
    start = read(0, 8)
    if start == b"version ":
        raise FitCheckError(
            f"{name} is a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder"
        )
    length = int.from_bytes(start, "little") if len(start) == 8 else 0
    if not 2 <= length <= LONGEST_HEADER:
        raise corrupt(name, "it does not begin with a header of safetensors")
    raw = read(8, length)
    if len(raw) < length:
        raise half(name)
    try:
        header = json.loads(raw.decode("utf-8"))
        tensors = [_tensor(k, v) for k, v in header.items() if k != "__metadata__"]
        end = max(
            (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
        )
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as fault:
        raise corrupt(name, f"its header is damaged ({type(fault).__name__})") from fault
    if size is not None and 8 + length + end > size:
        raise half(name)
    return tensors


def _tensor(name: str, row: Any) -> Tensor:
    dtype, shape, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)) or len(shape) > 8:
        raise ValueError("a size is no whole number")
    if not isinstance(dtype, str) or -(-prod(shape) * BITS[dtype] // 8) != end - begin:
        raise ValueError("shape and offsets differ")
    return Tensor(name, dtype, tuple(shape), end - begin)


def shards(index: Any, name: str) -> list[str]:
    """The files of a model.safetensors.index.json; FitCheckError for names beyond its folder."""
    files = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(files, Mapping) or not all(isinstance(f, str) for f in files.values()):
        raise corrupt(f"{name}: model.safetensors.index.json", "it has no weight_map")
    found = sorted(set(files.values()))
    for file in found:
        if not re.fullmatch(r"[\w][\w.+-]{0,200}\.safetensors", file, re.ASCII):
            raise corrupt(
                f"{name}: model.safetensors.index.json", f"it names the file {file[:60]!r}"
            )
    if not 0 < len(found) <= 2048:
        raise corrupt(f"{name}: model.safetensors.index.json", f"it names {len(found)} files")
    return found


def half(name: str) -> FitCheckError:
    return FitCheckError(
        f"{name} is shorter than its header says: the download did not end",
        "download it again; `hf download` goes on where it stopped",
    )


def corrupt(name: str, why: str) -> FitCheckError:
    return FitCheckError(f"{name} cannot be read: {why}", "download it again")


# What a quantized checkpoint stores beside the numbers themselves: scales, zeros, orders.
_BESIDE = re.compile(
    r"(?:^|[._])(?:qzeros|scales|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|SCB"
    r"|weight_format|weight_scale_inv|weight_scale|input_scale|[kvq]_scale|weight_shape"
    r"|weight_zero_point|weight_g_idx|weight_scale_2|weight_global_scale|input_global_scale"
    r"|quant_state\.\w+)$"
)
# Buffers that old checkpoints hold as tensors.
_BUFFER = re.compile(r"(?:rotary_emb\.inv_freq|attn\.masked_bias|(?:^|\.)h\.\d+\.attn\.bias)$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk)\.(\d+)\.")
_TOWER = re.compile(r"vision|visual|projector|tower|embed_audio|(?:^|\.)mm\.")


def weighed(model: Model, tensors: Iterable[Tensor], quantization: Mapping[str, Any]) -> Model:
    """The model with its checkpoint, its count of parameters held against the tensors' shapes."""
    named, method = list(tensors), scheme(quantization)
    layers, kept = model.num_layers, list[Tensor]()
    for tensor in named:
        at = _LAYER.search(tensor.name)
        tower = _TOWER.search(tensor.name)
        if at and int(at[1]) >= layers and not tower:
            continue  # multi-token prediction, which nothing loads
        if re.search(r"(?:^|\.)mtp\.", tensor.name) or _BUFFER.search(tensor.name):
            continue
        if model.tie_word_embeddings and re.search(r"(?:^|\.)lm_head\.weight$", tensor.name):
            continue  # the embedding once more
        kept.append(tensor)
    bits = _bits(quantization)
    logical = [(t, _elements(t, method, bits)) for t in kept]
    towers = sum(n for t, n in logical if _TOWER.search(t.name))
    count = sum(n for t, n in logical)
    found = summary(kept, "safetensors", layers, method)
    model = replace(model, checkpoint=found, note=None)
    if towers and not model.params_vision_audio and model.tensors is None:
        model = replace(model, params_vision_audio=towers, params=model.params + towers)
    if count == model.params:
        checked = "the shapes in its files have as many parameters as its config's closed form"
        return replace(model, status="headers", checked=checked)
    note = f"its files have {count:,} parameters, its config {model.params:,}"
    if method:  # some writers add biases of zeros, some drop what they fold
        return replace(model, note=note)
    return replace(model, status="mismatch", note=note)


def summary(tensors: list[Tensor], format: str, layers: int, quantization: str) -> Checkpoint:
    """The bytes of these tensors: in all, by type, by layer."""
    types: dict[str, int] = {}
    by_layer, experts = [0] * layers, [0] * layers
    for t in tensors:
        types[t.dtype] = types.get(t.dtype, 0) + t.bytes
        at = _LAYER.search(t.name)
        if at and int(at[1]) < layers and not _TOWER.search(t.name):
            by_layer[int(at[1])] += t.bytes
            if "experts" in t.name or "_exps." in t.name:
                experts[int(at[1])] += t.bytes
    names = {t.name for t in tensors}
    tied = not names & {"output.weight", "lm_head.weight", "embed_out.weight"}
    looked_up = re.compile(r"(?:token_embd|embed_tokens|wte|word_embeddings|embed_in)\.weight$")
    embedding = 0 if tied else sum(t.bytes for t in tensors if looked_up.search(t.name))
    ordered = tuple(sorted(types.items(), key=lambda pair: -pair[1]))
    total = sum(types.values())
    mixture = tuple(experts) if any(experts) else ()
    return Checkpoint(format, total, ordered, quantization, tuple(by_layer), mixture, embedding)


def _elements(tensor: Tensor, method: str, bits: int) -> int:
    """The parameters that a stored tensor stands for."""
    count, leaf = prod(tensor.shape), tensor.name.rpartition(".")[2]
    if not method:
        return count
    if method == "mxfp4" and leaf.endswith("_scales"):
        return 0
    if _BESIDE.search(tensor.name):
        return 0
    if leaf in ("qweight", "weight_packed") and tensor.dtype in ("I32", "U32"):
        return count * 32 // bits
    if tensor.dtype == "U8" and (leaf == "weight_packed" or leaf.endswith("_blocks")):
        return 2 * count
    if tensor.dtype == "U8" and method.startswith(("nf4", "fp4", "nvfp4")) and leaf == "weight":
        return 2 * count
    return count


def scheme(quantization: Mapping[str, Any]) -> str:
    """What a quantization_config says, in words: `gptq 4 bit, groups of 128`; empty: nothing."""
    method = quantization.get("quant_method")
    if not isinstance(method, str):
        return ""
    bits = _bits(quantization)
    if method in ("gptq", "awq"):
        group = quantization.get("group_size")
        groups = f", groups of {group}" if type(group) is int and group > 0 else ""
        return f"{method} {bits} bit{groups}"
    if method == "bitsandbytes":
        if quantization.get("load_in_8bit") is True:
            return "int8 (bitsandbytes)"
        kind = quantization.get("bnb_4bit_quant_type")
        return f"{'fp4' if kind == 'fp4' else 'nf4'} (bitsandbytes)"
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if isinstance(block, list) and [type(b) for b in block] == [int, int]:
            return f"fp8, blocks of {block[0]} x {block[1]}"
        return "fp8"
    if method == "compressed-tensors":
        kind = quantization.get("format")
        return f"compressed-tensors{f' {kind}' if isinstance(kind, str) else ''}"[:60]
    return method[:40]


def _bits(quantization: Mapping[str, Any]) -> int:
    """Bits of a packed weight, 4 where nothing is said."""
    bits = quantization.get("bits", quantization.get("w_bit"))
    groups = quantization.get("config_groups")
    if bits is None and isinstance(groups, Mapping):  # compressed-tensors: alike in all groups
        for group in groups.values():
            own = group.get("weights") if isinstance(group, Mapping) else None
            bits = own.get("num_bits") if isinstance(own, Mapping) else None
    return bits if type(bits) is int and 1 <= bits <= 8 else 4
