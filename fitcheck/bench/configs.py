"""A catalog row as a transformers config, so that a model is built from its shape alone.

No download and no weights of anyone's: `config_from(model)` sets what the row knows on the
architecture's own config class, and leaves the rest at that class's defaults. That the result has
the parameters it should is checked wherever it is built.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from fitcheck.bench.listed import spread, text_module
from fitcheck.errors import FitCheckError
from fitcheck.model import Model


def config_from(model: Model) -> PretrainedConfig:
    """The transformers config of a catalog row; FitCheckError for an unknown architecture.

    Dropout is off: the ratio of PPO and every comparison with a reference ask for it, and trainers
    switch it off too.
    """
    # Remote code that has Llama's shape was counted with Llama's class; so is it built.
    is_llama = model.architecture_class == "LlamaForCausalLM"
    model_type = "llama" if is_llama else model.model_type
    try:
        defaults = AutoConfig.for_model(model_type)
    except ValueError:
        raise _cannot(model, f"transformers knows no {model_type!r}") from None
    if model.hybrid:
        raise _cannot(model, "its recurrent layers run on kernels that are not modelled")
    if model.params_vision_audio:
        raise _cannot(model, "it is more than a language model")
    if not model.is_verified:
        raise _cannot(model, "its shape is not known for sure")
    shape = {k: v for k, v in _shape(model).items() if _takes(defaults, k) and v is not None}
    if model.attention.kind == "MLA":
        shape.pop("head_dim", None)  # there the part of a head that is rotated
    elif model.head_dim * model.num_attention_heads != model.hidden_size and _free(defaults):
        shape["head_dim"] = model.head_dim  # read even where the class does not declare it
    shape |= _OWN.get(model_type, lambda _: {})(model)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(defaults, name, None)
        if isinstance(token, int) and token >= model.vocab_size:
            shape[name] = 0  # a default of the class, outside of this vocabulary
    for name, value in vars(defaults).items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_prob")):
            shape[name] = 0.0
    config = AutoConfig.for_model(model_type, **shape)
    config.use_cache = False
    counts = dict(model.layer_type_counts or {})
    kinds = getattr(config, "layer_types", None)
    if kinds and counts and Counter(kinds) != counts and set(counts) <= set(kinds):
        config.layer_types = spread(counts)
    return config


def empty_module(model: Model, dtype: torch.dtype, attention: str | None, headless: bool) -> Any:
    """The row's module on meta, without its vocabulary head if headless; nothing is recorded.

    FitCheckError where transformers cannot build it, or not with the row's parameters.
    """
    if model.tensors is not None:
        return text_module(model, dtype, attention, headless)
    config = config_from(model)
    auto = AutoModel if headless else AutoModelForCausalLM
    if attention == "sdpa" and not _has_sdpa(auto, config):
        attention = "eager"  # what transformers runs these classes with
    try:
        with _disable_current_modes(), torch.device("meta"):
            module = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    except (AttributeError, ImportError, ValueError) as fault:
        raise _cannot(model, str(fault).split("\n")[0]) from fault
    _check_size(model, module, headless)
    return module


def _has_sdpa(auto: Any, config: PretrainedConfig) -> bool:
    """Whether the class that will be built runs on F.scaled_dot_product_attention."""
    return bool(getattr(auto._model_mapping[type(config)], "_supports_sdpa", True))


def _check_size(model: Model, module: nn.Module, headless: bool) -> None:
    """FitCheckError unless the module has exactly the parameters that the catalog states."""
    expected = model.backbone_params if headless else model.params
    count = sum(p.numel() for p in module.parameters())
    if count != expected:
        raise _cannot(model, f"the class has {count:,} parameters, not {expected:,}")


def _cannot(model: Model, why: str) -> FitCheckError:
    return FitCheckError(
        f"{model.id} cannot be built for a dry run: {why}",
        "the estimate covers it: fitcheck check",
    )


def _takes(config: PretrainedConfig, name: str) -> bool:
    return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)


def _free(config: PretrainedConfig) -> bool:
    """Whether head_dim can be set: it is no property of the class."""
    return not isinstance(getattr(type(config), "head_dim", None), property)


def _shape(model: Model) -> dict[str, Any]:
    """Sizes under the names that config classes use; a class takes those that it has."""
    bias = model.attention_bias.qkv
    shape: dict[str, Any] = {
        **{"hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers},
        **{"num_attention_heads": model.num_attention_heads, "vocab_size": model.vocab_size},
        **{"num_key_value_heads": model.num_key_value_heads, "head_dim": model.head_dim},
        **{"intermediate_size": model.intermediate_size, "mlp_bias": model.mlp_bias},
        **{"max_position_embeddings": model.max_position_embeddings},
        **{"tie_word_embeddings": model.tie_word_embeddings, "attention_bias": bias},
        **{"use_qkv_bias": bias, "sliding_window": model.sliding_window},
    }
    if model.moe is not None:
        moe = model.moe
        experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        chosen = ("num_experts_per_tok", "moe_k", "moe_topk")
        shape |= dict.fromkeys(experts, moe.num_experts)
        shape |= dict.fromkeys(chosen, moe.experts_per_token)
        shape |= {
            **{"moe_intermediate_size": moe.moe_intermediate_size},
            **{"n_shared_experts": moe.shared_experts, "num_shared_experts": moe.shared_experts},
            **{"shared_expert_intermediate_size": moe.shared_width},
            **{"shared_intermediate_size": moe.shared_width},
            **{"first_k_dense_replace": moe.first_k_dense, "num_dense_layers": moe.first_k_dense},
        }
    if model.attention.kind == "MLA":
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        shape |= {name: getattr(model.attention, name) for name in names}
    return shape


def _latent_attention(model: Model) -> dict[str, Any]:
    return {"q_lora_rank": model.attention.q_lora_rank}  # None means no low-rank queries


def _falcon(model: Model) -> dict[str, Any]:
    grouped = 1 < model.num_key_value_heads < model.num_attention_heads
    return {
        **{"num_kv_heads": model.num_key_value_heads, "ffn_hidden_size": model.intermediate_size},
        **{"new_decoder_architecture": grouped, "multi_query": model.num_key_value_heads == 1},
        **{"bias": model.attention_bias.qkv, "alibi": model.attention.position == "ALiBi"},
        **{"parallel_attn": model.norms_per_layer == 1 or grouped},
        **{"num_ln_in_parallel_attn": model.norms_per_layer if grouped else None},
    }


# What an architecture calls by names of its own.
_OWN: dict[str, Any] = {
    "opt": lambda m: {
        **{"ffn_dim": m.intermediate_size, "word_embed_proj_dim": m.embedding_width},
        **{"do_layer_norm_before": m.embedding_width == m.hidden_size},
    },
    "falcon": _falcon,
    "deepseek_v2": _latent_attention,
    "deepseek_v3": _latent_attention,
    "stablelm": lambda m: {
        **{"qk_layernorm": m.qk_norm, "use_parallel_residual": m.norms_per_layer == 1},
    },
    "cohere": lambda m: {"use_qk_norm": m.qk_norm},
    "glm4_moe": lambda m: {"use_qk_norm": m.qk_norm},
    "gpt_neo": lambda m: {"attention_types": [[["global", "local"], m.num_layers // 2]]},
    "phimoe": lambda m: {"lm_head_bias": m.lm_head_bias},
}
