"""A config.json read back: of every architecture, against the rows of the catalog."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fitcheck import catalog
from fitcheck.config import model_from
from fitcheck.errors import FitCheckError
from fitcheck.model import Model
from fitcheck.weights import has_closed_form, weights

SAME = (
    *("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "tie_word_embeddings", "params_embedding", "attention", "kv_cache_groups"),
    *("attention_bias", "mlp_bias", "lm_head_bias", "qk_norm", "mlp_gated", "norm_type"),
    *("norms_per_layer", "activation", "sliding_window", "params_active", "architecture_class"),
)
AS_LLAMA = ("exaone", "internlm2", "internlm3", "iquestcoder", "k2_horizon", "mimo")


def first_and_last() -> list[Model]:
    """Two rows of each architecture that has a closed form, or the only one."""
    found: dict[str, list[Model]] = {}
    for model in catalog.models():
        if has_closed_form(model) and model.is_verified:
            found.setdefault(model.model_type, []).append(model)
    return [
        row for rows in found.values() for row in {r.id: r for r in (rows[0], rows[-1])}.values()
    ]


def config_json(model: Model) -> dict[str, Any]:
    """The config.json that transformers would write for a row."""
    from fitcheck.bench.configs import config_from
    from fitcheck.bench.listed import config_of

    own = model.params_vision_audio or model.model_type in ("dbrx", "ernie4_5_moe")
    config = json.loads(
        json.dumps((config_of if own else config_from)(model).to_dict(), default=str)
    )
    text = config.get("text_config", config)
    text["sliding_window"] = model.sliding_window or text.get("sliding_window") and None
    if model.moe:
        for name in ("num_experts_per_tok", "moe_k", "moe_topk"):
            if name in text:
                text[name] = model.moe.experts_per_token
    if model.model_type in AS_LLAMA:
        config["model_type"] = model.model_type
    return dict(config)


@pytest.mark.oracle
@pytest.mark.parametrize("row", first_and_last(), ids=lambda row: str(row.id))
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_writes_is_read_back_as_the_row(row: Model) -> None:
    found = model_from(config_json(row), row.id)
    assert {k: getattr(found, k) for k in SAME} == {k: getattr(row, k) for k in SAME}
    towers = row.params_vision_audio or 0
    assert found.params == row.params - towers
    assert [w for w in weights(row) if w.kind != "tower"] == list(weights(found))


def test_what_a_config_leaves_out_is_its_class_default() -> None:
    """Gemma 3 4B's own config.json states five sizes; heads and vocabulary are the class's."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"model_type": "gemma3_text", "sliding_window": 1024}
    found = model_from({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "x")
    row = catalog.find_model("google/gemma-3-4b-pt")
    assert found.params == row.params - (row.params_vision_audio or 0)
    assert found.kv_cache_groups == row.kv_cache_groups


def test_a_hybrid_is_understood_as_the_catalog_row_of_its_sizes() -> None:
    row = catalog.find_model("Qwen/Qwen3-Next-80B-A3B-Instruct")
    config = {"model_type": "qwen3_next", "num_hidden_layers": row.num_layers}
    config |= {"hidden_size": row.hidden_size, "vocab_size": row.vocab_size}
    config |= {"intermediate_size": row.intermediate_size}
    config |= {"num_attention_heads": row.num_attention_heads}
    found = model_from(config, "me/my-next")
    assert (found.id, found.params, found.tensors) == ("me/my-next", row.params, row.tensors)
    with pytest.raises(FitCheckError, match="not understood"):
        model_from(config | {"hidden_size": row.hidden_size + 1}, "me/other")


LLAMA = {"model_type": "llama", "num_key_value_heads": 8}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "4096"},
        {"hidden_size": -1},
        {"hidden_size": True},
        {"hidden_size": 2**40},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 1e3},
        {"num_key_value_heads": 7},
        {"tie_word_embeddings": None, "attention_bias": "yes"},
        {"model_type": "bert"},
        {"model_type": ["llama"]},
        {"model_type": None},
    ],
)
def test_a_size_that_is_none_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(FitCheckError):
        model_from(LLAMA | change, "x")
