"""Rows that list their tensors (hybrids, new architectures): their transformers config and module.

    config = config_of(model)                 # from nothing but the row's fields
    module = text_module(model, torch.bfloat16, "sdpa", headless=False)

What a row's fields do not say is left at the class's default; a module whose parameters are then
not those of the row is refused, so a wrong guess covers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fitcheck.errors import FitCheckError
from fitcheck.model import Model

TOWER = re.compile(r"vision|visual|projector|tower|embed_audio")


def text_module(model: Model, dtype: torch.dtype, attention: str | None, headless: bool) -> Any:
    """The language model of such a row on meta, its towers one frozen tensor of their size.

    FitCheckError where transformers cannot build it, or not with the row's parameters.
    """
    import transformers

    try:
        config = config_of(model)
        text = config.get_text_config()
        auto = transformers.AutoModel if headless else transformers.AutoModelForCausalLM
        kind = auto._model_mapping.get(type(text), None)
        if kind is None:
            raise _cannot(model, f"transformers has no text model of {type(text).__name__}")
        kind = kind[0] if isinstance(kind, tuple) else kind
        if attention == "sdpa" and not kind._supports_sdpa:
            attention = "eager"
        text.use_cache = False
        with _disable_current_modes(), torch.device("meta"):
            module = auto.from_config(text, dtype=dtype, attn_implementation=attention)
    except (AttributeError, ImportError, StrictDataclassError, ValueError) as fault:
        raise _cannot(model, str(fault).strip().split("\n")[-1].strip()) from fault
    towers = model.params_vision_audio or 0
    expected = (model.backbone_params if headless else model.params) - towers
    count = sum(p.numel() for p in module.parameters())
    if count != expected:
        raise _cannot(model, f"the class has {count:,} parameters, not {expected:,}")
    if towers:
        with _disable_current_modes():
            flat = torch.empty(towers, dtype=dtype, device="meta")
        module.register_parameter("tower", nn.Parameter(flat, requires_grad=False))
    return module


def spread(counts: Mapping[str, int]) -> list[str]:
    """That many layers of each kind, the rarer ones at even distances."""
    layers = sum(counts.values())
    places = [
        ((i + 1) * layers / count, kind) for kind, count in counts.items() for i in range(count)
    ]
    return [kind for _, kind in sorted(places)]


def _cannot(model: Model, why: str) -> FitCheckError:
    return FitCheckError(
        f"{model.id} cannot be built for a dry run: {why}",
        "choose a model that `fitcheck models` does not mark",
    )


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
            fields["layer_types"] = spread(kinds_of_layers)
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
