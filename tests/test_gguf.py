"""GGUF files, written by llama.cpp's own library (PyPI gguf) and read by ours."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import LLAMA

from fitcheck import catalog, check
from fitcheck.checkpoint import Tensor
from fitcheck.config import model_from
from fitcheck.errors import FitCheckError
from fitcheck.gguf import ARCHITECTURES, TYPES, gguf_header, gguf_model
from fitcheck.hub import read
from fitcheck.quants import BLOCKS
from fitcheck.weights import weights

Type = gguf.GGMLQuantizationType
NAMES = {
    **{"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"},
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"},
    "post_attention_layernorm": "ffn_norm",
}
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}


def tensors() -> list[tuple[str, tuple[int, ...], Any]]:
    """(name, shape as numpy has it, type) of a two-layer Llama as Q4_K_M mixes it."""
    found = []
    for weight in weights(model_from(WIDE, "x")):
        for layer in range(weight.copies):
            name = f"{NAMES[weight.name]}.weight"
            if weight.copies > 1:
                name = f"blk.{layer}.{name}"
            kind = Type.F32 if len(weight.shape) == 1 else Type.Q4_K
            kind = Type.Q6_K if "attn_v" in name or name == "output.weight" else kind
            found.append((name, weight.shape, kind))
    return found


def written(path: Path, some: slice = slice(None), keys: bool = True, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if keys:
        writer.add_block_count(2)
        writer.add_embedding_length(256)
        writer.add_feed_forward_length(512)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_context_length(8192)
        writer.add_array("tokenizer.ggml.tokens", [f"token {n}" for n in range(300)])
        writer.add_array("tokenizer.ggml.scores", [0.5] * 300)
    for key, value in metadata.items():
        writer.add_uint16(key.replace("_", ".", 1), value)
    for name, shape, kind in tensors()[some]:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
        if kind == Type.F32:
            writer.add_tensor(name, np.zeros(shape, np.float32))
        else:
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gguf") / "tiny-Q4_K_M.gguf")


def test_the_types_are_ggmls() -> None:
    for number, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if number is Type.Q8_1:
            continue  # never in a file; its library still has the size of before 2024
        assert TYPES[number.value] == (number.name.lower(), block, size)
    assert all(TYPES[Type[name.upper()].value][1:] == size for name, size in BLOCKS.items())


def test_the_architectures_are_llama_cpps() -> None:
    assert set(ARCHITECTURES) <= {*gguf.MODEL_ARCH_NAMES.values(), "seed-oss"}


def test_a_file_is_read_as_its_own_library_reads_it(tiny: Path) -> None:
    reader = gguf.GGUFReader(tiny)
    data = tiny.read_bytes()
    metadata, rows = gguf_header(data, len(data), "tiny")
    assert metadata["llama.context_length"] == 8192 and metadata["tokenizer.ggml.tokens"] == 300
    ours = [(t.name, t.dtype, list(t.shape), t.bytes) for t in rows]
    theirs = [
        (t.name, t.tensor_type.name.lower(), list(map(int, t.shape)), int(t.n_bytes))
        for t in reader.tensors
    ]
    assert ours == theirs


def test_a_file_is_a_model_at_its_own_bytes(tiny: Path) -> None:
    model = read(str(tiny))
    assert (model.status, model.params) == ("headers", model_from(WIDE, "x").params)
    assert model.checkpoint
    assert model.checkpoint.bytes == sum(int(t.n_bytes) for t in gguf.GGUFReader(tiny).tensors)
    assert model.checkpoint.quantization == "q4_k + q6_k"
    report = check(str(tiny), gpu="4090", method="inference")
    assert report.plan.quant == "checkpoint"
    terms = {t.name: t.bytes for t in report.phases[0].terms}
    embedding = 300 * 256 // 256 * 144  # looked up in RAM, q4_k
    assert terms["weights"] == model.checkpoint.bytes - embedding


def test_a_split_file_is_one_model(tmp_path: Path, tiny: Path) -> None:
    first = written(tmp_path / "m-00001-of-00002.gguf", slice(0, 9), split_count=2)
    with pytest.raises(FitCheckError, match="1 of the 2 parts are missing"):
        read(str(first))
    written(tmp_path / "m-00002-of-00002.gguf", slice(9, None), keys=False, split_count=2)
    whole, parts = read(str(tiny)).checkpoint, read(str(first)).checkpoint
    assert whole and parts and parts.bytes == whole.bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:100], "did not end"),
        (lambda b: b[:-64], "did not end"),
        (lambda b: b"GGML" + b[4:], "no GGUF"),
        (lambda b: b"version https://git-lfs.github.com", "LFS"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "big-endian"),
        (lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:], "claims"),
        (lambda b: b[:16] + struct.pack("<Q", 2**60) + b[24:], "claims"),
        (lambda b: b[:24] + struct.pack("<Q", 2**63) + b[32:], "claims"),
        (lambda b: b.replace(b"blk.1.attn_q", b"blk.1.attn_x"), ""),
    ],
    ids=["cut", "short", "magic", "pointer", "endian", "tensors", "keys", "name", "tensor"],
)
def test_a_damaged_file_is_an_error_or_the_same_sizes(
    tiny: Path, tmp_path: Path, change: Any, words: str
) -> None:
    place = tmp_path / "x.gguf"
    place.write_bytes(change(tiny.read_bytes()))
    if words:
        with pytest.raises(FitCheckError, match=words):
            read(str(place))
    else:
        assert read(str(place)).status == "headers"  # names inside a layer do not matter


def test_an_empty_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    for name in ("x.gguf", "y.gguf"):
        with pytest.raises(FitCheckError):
            read(str(tmp_path / name))


def test_a_catalog_model_has_no_files(tiny: Path) -> None:
    assert catalog.find_model("qwen3-8b").checkpoint is None
    with pytest.raises(FitCheckError, match="quant"):
        check("qwen3-8b", gpu="4090", method="inference", quant="checkpoint")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3next"),
        ("tiiuae/Falcon-H1-0.5B-Instruct", "falcon-h1"),
        ("ai21labs/Jamba-v0.1", "jamba"),
    ],
)
def test_a_hybrid_file_is_the_catalog_row_of_its_sizes(name: str, kind: str) -> None:
    row = catalog.find_model(name)
    metadata = {
        "general.architecture": kind,
        f"{kind}.block_count": row.num_layers,
        f"{kind}.embedding_length": row.hidden_size,
        f"{kind}.attention.head_count": row.num_attention_heads,
        f"{kind}.feed_forward_length": row.intermediate_size,
    }
    embedding = row.vocab_size * row.hidden_size
    rest = row.params - embedding - (0 if row.tie_word_embeddings else embedding)
    shape = (row.hidden_size, row.vocab_size)
    tensors = [
        Tensor("token_embd.weight", "q8_0", shape, embedding // 32 * 34),
        Tensor("blk.0.all.weight", "q8_0", (rest,), rest // 32 * 34),
    ]
    if not row.tie_word_embeddings:
        tensors.append(Tensor("output.weight", "q8_0", shape, embedding // 32 * 34))
    found = gguf_model(metadata, tensors, "x.gguf")
    assert (found.status, found.params, found.tensors) == ("headers", row.params, row.tensors)
    assert found.kv_cache_groups == row.kv_cache_groups
    metadata[f"{kind}.embedding_length"] += 1
    with pytest.raises(FitCheckError, match="not understood"):
        gguf_model(metadata, tensors, "x.gguf")
