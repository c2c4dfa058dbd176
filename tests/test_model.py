"""Every row of catalog/models/: schema, consistency and tensors; and values worked by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fitcheck.errors import FitCheckError
from fitcheck.model import VERIFIED, Model
from fitcheck.weights import has_closed_form, has_weights, weights

ROOT = Path(__file__).parents[1] / "catalog" / "models"
STATUSES = VERIFIED | {"mismatch", "unverified"}
KINDS = "embedding position linear expert router norm bias other head tower"

# The JSON type of each key; a key that is absent is not known.
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(
        (
            *("params", "params_published", "params_active", "params_text", "params_vision_audio"),
            *("params_embedding", "hidden_size", "num_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
            *("max_position_embeddings", "sliding_window", "attention_chunk_size"),
            "norms_per_layer",
        ),
        int,
    ),
    **dict.fromkeys(
        (
            *("id", "family", "name", "size_label", "model_type", "architecture_class", "status"),
            *("params_published_note", "activation", "norm_type", "license", "release_date"),
            *("checkpoint_precision", "gated_basis", "alignment_recipe", "note", "checked"),
            *("alignment_recipe_source", "rewardbench_dpo_ref_model"),
        ),
        str,
    ),
    **dict.fromkeys(
        (
            *("tie_word_embeddings", "mlp_bias", "lm_head_bias", "qk_norm", "mlp_gated", "gated"),
            *("has_mtp_in_checkpoint", "native_fp8", "formula_matches"),
            "alignment_recipe_seen_in_stored_source",
        ),
        bool,
    ),
    **dict.fromkeys(("attention", "attention_bias", "moe", "hybrid", "layer_type_counts"), dict),
    **dict.fromkeys(("kv_cache_groups", "sources", "tensors"), list),
}


@cache
def families() -> dict[str, list[dict[str, Any]]]:
    files = {
        path.name: json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.json")
    }
    files.pop("index.json")
    assert all(set(file) == {"family", "models"} for file in files.values())
    assert all(row["family"] == file["family"] for file in files.values() for row in file["models"])
    return {name: file["models"] for name, file in files.items()}


def rows() -> Iterator[dict[str, Any]]:
    for models in families().values():
        yield from models


@cache
def models() -> dict[str, Model]:
    return {row["id"]: Model.from_json(row) for row in rows()}


def kv_bytes(model: Model, tokens: int) -> int:
    """K and V of one sequence in bf16: the definition of the fields, written out once."""
    assert model.kv_cache_groups is not None
    return 2 * sum(
        group.elems_per_token * min(tokens, group.window or tokens)
        for group in model.kv_cache_groups
    )


# --- the rows ---


def test_ids_are_unique_and_none_is_lost() -> None:
    ids = [row["id"] for row in rows()]
    assert len(ids) == len(set(ids)) >= 622  # 621 of the survey, and one that was measured
    assert all(len(id.split("/")) == 2 for id in ids)


def test_types() -> None:
    for row in rows():
        for key, value in row.items():
            assert type(value) is TYPES[key], (row["id"], key, value)


def test_every_row_has_source_check_and_status() -> None:
    for row in rows():
        assert row["sources"] and all(row["sources"]), row["id"]
        assert row["checked"], row["id"]
        assert row["status"] in STATUSES, row["id"]
        assert "release_date" not in row or re.fullmatch(r"20\d\d-[01]\d", row["release_date"])
        if row.get("alignment_recipe_seen_in_stored_source"):
            assert row["alignment_recipe_source"], row["id"]


def test_doubt_is_told_of_the_unverified_and_of_nothing_else() -> None:
    doubtful = {id for id, model in models().items() if model.doubt}
    assert doubtful == {row["id"] for row in rows() if row["status"] in ("mismatch", "unverified")}
    assert "moonshotai/Kimi-K3" in doubtful
    assert models()["Qwen/Qwen3-8B"].doubt == ""
    recalled = models()["microsoft/Phi-4-mini-instruct"]
    assert recalled.alignment_recipe and recalled.recipe_doubt == "recalled"


def test_numbers_are_positive_and_parts_do_not_exceed_the_whole() -> None:
    for row in rows():
        for key, value in row.items():
            assert TYPES[key] is not int or value > 0, (row["id"], key, value)
        model = models()[row["id"]]
        if model.moe and model.is_verified:
            assert model.params_active, model.id
        if model.params_active:
            assert model.params_active < model.params, model.id
        if model.params_text:
            assert model.params_text + model.params_vision_audio == model.params, model.id
        if model.moe:
            assert model.moe.experts_per_token <= model.moe.num_experts, model.id


def test_embedding_is_vocabulary_times_hidden_size() -> None:
    odd = {
        model.id
        for model in models().values()
        if model.is_verified and model.params_embedding != model.vocab_size * model.hidden_size
    }
    assert odd == {"facebook/opt-350m"}
    assert models()["facebook/opt-350m"].embedding_width == 512


def test_heads() -> None:
    for model in models().values():
        if not model.is_verified or model.num_attention_heads is None:
            continue
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        assert heads % kv_heads == 0, model.id
        kind = "MHA" if heads == kv_heads else "MQA" if kv_heads == 1 else "GQA"
        if model.attention.kind == "MLA":
            assert model.attention.kv_lora_rank, model.id
        elif model.model_type != "deepseek_v4":  # a kind of its own
            assert model.attention.kind == kind, model.id


def test_layer_kinds_add_up() -> None:
    for model in models().values():
        if model.layer_type_counts:
            assert sum(model.layer_type_counts.values()) == model.num_layers, model.id
        moe = model.moe
        if moe and moe.moe_layers is not None and moe.dense_layers is not None:
            assert moe.moe_layers + moe.dense_layers == model.num_layers, model.id


def test_cached_layers_are_those_of_the_layer_kinds() -> None:
    """Except where layers share a cache (Gemma 3n, 4), hold several, or mix state and cache."""
    for model in models().values():
        kinds, groups = model.layer_type_counts, model.kv_cache_groups
        if not (kinds and groups) or "shared_layers" in str(model.hybrid):
            continue
        cached = {group.kind: group.layers for group in groups if group.kind != "indexer"}
        attends = {kind: n for kind, n in kinds.items() if kind not in STATE_ONLY}
        if "mla" in cached or model.model_type == "gpt_neo":  # one cache for all kinds
            assert sum(cached.values()) == sum(attends.values()), model.id
        else:
            assert cached == attends, model.id


STATE_ONLY = ("linear_attention", "conv", "mamba")


def test_cached_elements_follow_from_the_heads() -> None:
    own = ("gemma4", "gemma4_unified", "mimo_v2_flash")  # head sizes differ by layer kind
    for model in models().values():
        for group in model.kv_cache_groups or ():
            name = (model.id, group.kind)
            assert (group.window is not None) == ("slid" in group.kind or "chunk" in group.kind)
            assert group.window in (None, model.sliding_window, model.attention_chunk_size), name
            size = (group.k_elems_per_token, group.v_elems_per_token)
            if group.kind == "mla":
                mla = model.attention
                assert size == ((mla.kv_lora_rank or 0) + (mla.qk_rope_head_dim or 0), 0), name
            elif group.kind != "indexer" and model.model_type not in own:
                assert size == (model.num_key_value_heads * model.head_dim,) * 2, name


def test_index_agrees_with_the_family_files() -> None:
    index = json.loads((ROOT / "index.json").read_text(encoding="utf-8"))["models"]
    assert [entry["id"] for entry in index] == list(dict.fromkeys(entry["id"] for entry in index))
    files = {row["id"]: (name, row) for name, models in families().items() for row in models}
    assert {entry["id"] for entry in index} == set(files)
    for entry in index:
        name, row = files[entry["id"]]
        expected = {key: row[key] for key in INDEXED if row.get(key) is not None} | {"file": name}
        if "alignment_recipe" in row:
            seen = row.get("alignment_recipe_seen_in_stored_source") is True
            expected["alignment_recipe_seen"] = seen
        assert {key: value for key, value in entry.items() if value is not None} == expected


INDEXED = (
    *("id", "name", "family", "model_type", "params", "params_active", "release_date"),
    *("license", "status", "alignment_recipe"),
)


# --- the tensors ---


def test_weights_add_up_to_the_parameters_of_every_verified_row() -> None:
    closed, listed = 0, 0
    for model in models().values():
        if has_weights(model):
            assert sum(weight.params for weight in weights(model)) == model.params, model.id
            assert {weight.kind for weight in weights(model)} <= set(KINDS.split()), model.id
            closed += has_closed_form(model)
            listed += not has_closed_form(model)
        else:
            assert model.status == "unverified", model.id
    assert (closed, listed) == (516, 97)


def test_closed_form_is_where_the_facts_say_it_is() -> None:
    for model in models().values():
        assert has_closed_form(model) == (model.formula_matches is True), model.id


def test_parts_agree_with_the_published_parts() -> None:
    """Embedding, active parameters and the text part are counted apart from the total."""
    for model in models().values():
        if not has_weights(model):
            continue
        by_kind = dict.fromkeys(KINDS.split(), 0)
        for weight in weights(model):
            by_kind[weight.kind] += weight.params
        assert by_kind["tower"] == (model.params_vision_audio or 0), model.id
        assert by_kind["head"] == model.head_params, model.id
        if has_closed_form(model):
            assert by_kind["embedding"] == model.params_embedding, model.id
        if model.moe and model.model_type != "longcat_flash":  # whose zero experts are drawn too
            all_experts = sum(
                w.params
                for w in weights(model)
                if "experts." in f".{w.name}" and "shared" not in w.name
            )
            idle = model.moe.num_experts - model.moe.experts_per_token
            active = (
                model.params_text or model.params
            ) - all_experts * idle // model.moe.num_experts
            assert active == model.params_active, model.id


def test_tensors_of_llama_3_1_8b() -> None:
    found = {w.name: (w.shape, w.copies, w.kind) for w in weights(models()[LLAMA])}
    assert found == {
        "embed_tokens": ((128256, 4096), 1, "embedding"),
        "self_attn.q_proj": ((4096, 4096), 32, "linear"),
        "self_attn.k_proj": ((1024, 4096), 32, "linear"),
        "self_attn.v_proj": ((1024, 4096), 32, "linear"),
        "self_attn.o_proj": ((4096, 4096), 32, "linear"),
        "mlp.gate_proj": ((14336, 4096), 32, "linear"),
        "mlp.up_proj": ((14336, 4096), 32, "linear"),
        "mlp.down_proj": ((4096, 14336), 32, "linear"),
        "input_layernorm": ((4096,), 32, "norm"),
        "post_attention_layernorm": ((4096,), 32, "norm"),
        "norm": ((4096,), 1, "norm"),
        "lm_head": ((128256, 4096), 1, "head"),
    }


LLAMA = "meta-llama/Llama-3.1-8B"


def test_a_score_head_replaces_the_lm_head() -> None:
    llama, gemma = models()[LLAMA], models()["google/gemma-2-2b"]
    # Published size of Skywork-Reward-Llama-3.1-8B and its like.
    assert llama.backbone_params + llama.score_head_params == 7_504_928_768
    # Tied: nothing is saved, the embedding stays.
    assert gemma.backbone_params + gemma.score_head_params == gemma.params + 2304


def test_lora_rank_16_on_llama_3_1_8b() -> None:
    """The 41.9 M trainable parameters PEFT prints for r=16 on all linear layers."""
    linears = [w for w in weights(models()[LLAMA]) if w.kind == "linear"]
    assert sum(16 * sum(w.shape) * w.copies for w in linears) == 41_943_040


def test_unverified_rows_are_refused() -> None:
    with pytest.raises(FitCheckError, match="moonshotai/Kimi-K3.*no closed form") as raised:
        weights(models()["moonshotai/Kimi-K3"])
    assert raised.value.hint


# --- the KV cache, worked by hand ---


@pytest.mark.parametrize(
    ("id", "tokens", "expected"),
    [
        # GQA: 32 layers x 2 x 8 heads x 128 x 2 B = 128 KiB a token
        ("meta-llama/Llama-3.1-8B", 1, 131_072),
        ("meta-llama/Llama-3.1-70B", 1, 80 * 2 * 8 * 128 * 2),
        # MHA, MQA
        ("meta-llama/Llama-2-7b-hf", 1, 32 * 2 * 4096 * 2),
        ("tiiuae/falcon-7b", 1, 32 * 2 * 64 * 2),
        # MLA: 61 layers x (512 + 64) x 2 B (DeepSeek-V3, arXiv 2412.19437: about 70 KB)
        ("deepseek-ai/DeepSeek-V3", 1, 61 * 576 * 2),
        # The same with the indexer's 128 keys (sparse attention)
        ("deepseek-ai/DeepSeek-V3.2", 1, 61 * (576 + 128) * 2),
        # Gemma 3 27B: 62 layers, of which 52 see 1024 tokens
        ("google/gemma-3-27b-it", 1, 62 * 2 * 16 * 128 * 2),
        ("google/gemma-3-27b-it", 32_768, (52 * 1024 + 10 * 32_768) * 2 * 16 * 128 * 2),
        # GPT-Neo's local layers keep every token all the same
        ("EleutherAI/gpt-neo-125m", 2048, 2048 * 12 * 2 * 768 * 2),
        # Qwen3.5: one layer in four attends; LFM2: 6 of 16; Mamba: none
        ("Qwen/Qwen3.5-4B", 1, 8 * 2 * 4 * 256 * 2),
        ("LiquidAI/LFM2-1.2B", 1, 6 * 2 * 8 * 64 * 2),
        ("state-spaces/mamba-2.8b-hf", 100_000, 0),
    ],
)
def test_kv_bytes(id: str, tokens: int, expected: int) -> None:
    assert kv_bytes(models()[id], tokens) == expected


# --- reading a row ---


def test_a_malformed_row_is_named() -> None:
    row = next(row for row in rows() if row["id"] == LLAMA)
    for broken, complaint in (
        ({key: value for key, value in row.items() if key != "sources"}, "no 'sources'"),
        ({key: value for key, value in row.items() if key != "hidden_size"}, "no 'hidden_size'"),
        ({key: value for key, value in row.items() if key != "checked"}, "checked"),
        (row | {"hiden_size": 4096}, "hiden_size"),
        (row | {"attention": {"kind": "GQA", "heads": 8}}, "heads"),
        (row | {"moe": {"num_experts": 8}}, "experts_per_token"),
    ):
        with pytest.raises(FitCheckError, match=re.escape(complaint)) as raised:
            Model.from_json(broken)
        assert LLAMA in raised.value.message


def test_a_model_cannot_be_changed() -> None:
    model = models()["Qwen/Qwen3.5-4B"]
    with pytest.raises(AttributeError):
        model.params = 1  # type: ignore[misc]
    assert model.hybrid
    with pytest.raises(TypeError):
        model.hybrid["linear_num_key_heads"] = 1  # type: ignore[index]
    again = Model.from_json(next(row for row in rows() if row["id"] == model.id))
    assert again == model and hash(again) == hash(model)
