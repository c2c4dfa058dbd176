"""`weights()` against transformers: the class itself on the meta device, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fitcheck.model import Model
from fitcheck.weights import has_closed_form, weights

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parents[1] / "catalog" / "models"
PREFIX = re.compile(r"^(model\.|language_model\.|transformer\.|gpt_neox\.|decoder\.|backbone\.)+")
LAYER = re.compile(r"^(layers|h|blocks)\.\d+\.")
TOWER = re.compile(r"vision|visual|projector|tower|embed_audio")

# Of the architectures whose rows list their tensors, those that a row's fields rebuild.
LISTED = (
    *("falcon_h1", "falcon_mamba", "granite_swa", "granitemoehybrid", "lfm2"),
    *("lfm2_moe", "mamba", "mimo_v2_flash", "muse_glimmer", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_next", "recurrent_gemma"),
)
# Full size: no layer left out. A family each of dense, tied, vision, mixture, latent attention.
WHOLE = (
    *("openai-community/gpt2", "facebook/opt-350m", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B"),
    *("google/gemma-2-9b", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b"),
)


@cache
def models() -> dict[str, Model]:
    files = (path for path in ROOT.glob("*.json") if path.name != "index.json")
    rows = (row for path in files for row in json.loads(path.read_text("utf-8"))["models"])
    return {row["id"]: Model.from_json(row) for row in rows}


def closed() -> dict[str, list[Model]]:
    """The models with a closed form by model_type."""
    found: dict[str, list[Model]] = {}
    for model in models().values():
        if has_closed_form(model):
            found.setdefault(model.model_type, []).append(model)
    return found


def distinct(group: list[Model]) -> Iterator[Model]:
    """One model of each architecture: fine-tunes repeat the sizes of their base."""
    seen = set()
    for model in group:
        tensors = weights(shortened(model))
        if tensors not in seen:
            seen.add(tensors)
            yield model


def loaded(model: Model) -> Any:
    """The class of `model` as transformers builds it, without storage."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, model.architecture_class or "")._from_config(config_of(model))


def tensors_of(module: Any) -> Counter[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) of every parameter outside the towers, as `weights()` tells them."""
    modules = dict(module.named_modules())
    head = module.get_output_embeddings()
    found: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for path, parameter in module.named_parameters():
        if TOWER.search(path):
            continue
        owner, _, last = path.rpartition(".")
        name = re.sub(r"\.\d+(?=\.|$)", "", LAYER.sub("", PREFIX.sub("", path)))
        kind = "head" if modules[owner] is head else kind_of(modules[owner], last)
        found[name.removesuffix(".weight"), tuple(parameter.shape), kind] += 1
    return found


def kind_of(owner: Any, name: str) -> str:
    """What PEFT, bitsandbytes and an optimizer can tell apart: the class of the module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, (nn.Linear, Conv1D)):
        return "linear" if name == "weight" else "bias"
    return "norm" if "Norm" in type(owner).__name__ else "bare"


KIND = {"position": "embedding", "expert": "bare", "router": "bare", "other": "bare"}


def told(model: Model) -> Counter[tuple[str, tuple[int, ...], str]]:
    """`weights(model)` in the terms of `tensors_of`."""
    found: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for weight in weights(model):
        kind = KIND.get(weight.kind, weight.kind)
        kind = "bare" if ".experts." in weight.name and kind == "bias" else kind
        if kind != "tower":
            found[weight.name, weight.shape, kind] += weight.copies
    return found


@pytest.mark.parametrize("model_type", sorted(closed()))
def test_tensors_of_every_architecture(model_type: str) -> None:
    """Every distinct architecture of the catalog with a closed form, two layers of it."""
    for model in distinct(closed()[model_type]):
        short = shortened(model)
        assert tensors_of(loaded(short)) == told(short), model.id


@pytest.mark.parametrize("id", WHOLE)
def test_tensors_of_whole_models(id: str) -> None:
    model = models()[id]
    assert tensors_of(loaded(model)) == told(model)


@pytest.mark.parametrize("model_type", LISTED)
def test_tensors_that_rows_list(model_type: str) -> None:
    """Whole, too; what the fields of a row do not say (a latent's width) is left to its total."""
    listed = [m for m in models().values() if m.tensors and m.model_type == model_type]
    assert listed
    for model in {model.tensors: model for model in listed}.values():
        if not (model.moe and model.moe.routed_expert_hidden_size):
            assert tensors_of(loaded(model)) == told(model), model.id


@pytest.mark.parametrize(
    "id",
    (
        *("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "google/gemma-2-9b"),
        *("mistralai/Mistral-7B-Instruct-v0.2", "google/gemma-3-27b-it", "openai/gpt-oss-20b"),
        *("EleutherAI/gpt-neo-125m", "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3.5-4B"),
        *("CohereLabs/c4ai-command-r7b-12-2024", "LiquidAI/LFM2-1.2B"),
        *("allenai/Olmo-3-1025-7B", "microsoft/Phi-3-mini-4k-instruct"),
    ),
)
def test_cache_groups_are_those_of_the_cache(id: str) -> None:
    """How many layers keep every token and how many a window, as transformers' own cache does."""
    from transformers import DynamicCache

    model = models()[id]
    layers = DynamicCache(config=config_of(model)).layers
    kept = Counter(getattr(layer, "sliding_window", None) for layer in layers if is_kv(layer))
    groups = model.kv_cache_groups or ()
    assert kept == sum((Counter({g.window: g.layers}) for g in groups), Counter())


def is_kv(layer: Any) -> bool:
    return "Linear" not in type(layer).__name__


def shortened(model: Model, layers: int = 2) -> Model:
    """The same architecture with fewer layers, a dense one first where the mixture has any."""
    moe = model.moe
    if moe:
        dense = min(1, moe.dense_layers or 0)
        moe = moe._replace(dense_layers=dense, moe_layers=layers - dense, first_k_dense=dense)
    return dataclasses.replace(model, num_layers=layers, moe=moe)


def config_of(model: Model) -> Any:
    """The transformers config of `model`, from nothing but the row's fields."""
    import transformers

    config_class = getattr(transformers, model.architecture_class or "").config_class
    text_class = config_class.sub_configs.get("text_config")
    own = text_class or config_class
    names = getattr(own, "attribute_map", {})
    fields = {names.get(key, key): value for key, value in _fields(model).items()}
    fields |= _deviations(model)
    if model.model_type == "falcon":
        del fields["head_dim"]  # a property there
    if hasattr(own, "sliding_window"):
        fields["sliding_window"] = model.sliding_window
    if text_class:
        tied = model.tie_word_embeddings
        return config_class(text_config=fields, tie_word_embeddings=tied)
    return config_class(**fields)


def _fields(model: Model) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_word_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "attention_bias": model.attention_bias.qkv,
        "mlp_bias": model.mlp_bias,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    mla = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    if model.attention.kv_lora_rank:
        fields |= {key: getattr(model.attention, key) for key in mla}
    if model.moe:
        moe = model.moe
        for key in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"):
            fields[key] = moe.num_experts
        for key in ("n_shared_experts", "num_shared_experts", "num_shared_expert"):
            fields[key] = moe.shared_experts
        fields["moe_num_shared_experts"] = moe.shared_experts
        fields["moe_intermediate_size"] = moe.moe_intermediate_size
        fields["shared_expert_intermediate_size"] = moe.shared_width
        dense = moe.dense_layers or 0
        kinds = ["dense"] * dense + ["sparse"] * moe.moe_layers
        fields |= {"first_k_dense_replace": dense, "num_dense_layers": dense}
        fields |= {"moe_layer_start_index": dense, "mlp_layer_types": kinds}
    if model.hybrid:
        fields |= model.hybrid
        kinds_of_layers = fields.pop("layers_block_type_counts", model.layer_type_counts) or {}
        if kinds_of_layers:
            fields["layer_types"] = [kind for kind, n in kinds_of_layers.items() for _ in range(n)]
    return fields


def _deviations(model: Model) -> dict[str, Any]:
    """What the config classes call differently from everybody else."""
    one_norm = model.norms_per_layer == 1
    bias = model.attention_bias.qkv
    match model.model_type:
        case "gpt_neo":
            return {"attention_types": [[["global", "local"], model.num_layers // 2]]}
        case "opt":
            post_norm = model.embedding_width != model.hidden_size
            return {
                "ffn_dim": model.intermediate_size,
                "word_embed_proj_dim": model.embedding_width,
                "do_layer_norm_before": not post_norm,
            }
        case "falcon":
            grouped = model.num_key_value_heads > 1
            return {
                "num_kv_heads": model.num_key_value_heads,
                "new_decoder_architecture": grouped,
                "num_ln_in_parallel_attn": 1 if one_norm else 2,
            }
        case "dbrx":
            moe = model.moe
            assert moe
            return {
                "attn_config": {"kv_n_heads": model.num_key_value_heads, "rope_theta": 5e5},
                "ffn_config": {
                    "ffn_hidden_size": moe.moe_intermediate_size,
                    "moe_num_experts": moe.num_experts,
                    "moe_top_k": moe.experts_per_token,
                },
            }
        case "gpt_bigcode":
            return {"multi_query": model.num_key_value_heads == 1}
        case "stablelm":
            return {
                "use_qkv_bias": bias,
                "use_parallel_residual": one_norm,
                "qk_layernorm": model.qk_norm,
            }
        case "cohere" | "glm4_moe":
            return {"use_qk_norm": model.qk_norm}
        case "phimoe":
            return {"lm_head_bias": model.lm_head_bias}
        case "starcoder2":
            return {"use_bias": bias}
        case "exaone4" if model.sliding_window is None:
            return {"layer_types": ["full_attention"] * model.num_layers}
        case "lfm2":
            return {"block_auto_adjust_ff_dim": False}
        case "lfm2_moe":
            return {"mlp_layer_types": None}
        case "falcon_h1":
            return {"mamba_rms_norm": model.norms_per_layer == 3}
        case "granitemoehybrid":
            shared = model.moe.shared_width if model.moe else model.intermediate_size
            experts = model.moe.num_experts if model.moe else 0
            return {"shared_intermediate_size": shared, "num_local_experts": experts}
        case "nemotron_h" if model.moe:
            return {"moe_shared_expert_intermediate_size": model.moe.shared_width}
    return {}
