"""A catalog row as a transformers config, so that a model is built from its shape alone.

No download and no weights of anyone's: `config_from(model)` sets what the row knows on the
architecture's own config class, and leaves the rest at that class's defaults.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from fitcheck.errors import FitCheckError
from fitcheck.model import Model


def config_from(model: Model) -> PretrainedConfig:
    """The transformers config of a catalog row; FitCheckError for an unknown architecture.

    Dropout is off: the ratio of PPO and every comparison with a reference ask for it, and trainers
    switch it off too.
    """
    try:
        config = AutoConfig.for_model(model.model_type)
    except ValueError:
        raise _cannot(model, f"transformers knows no architecture {model.model_type!r}") from None
    for name, value in _shape(model).items():
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
    for name, value in vars(config).items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_prob")):
            setattr(config, name, 0.0)
    config.use_cache = False
    config.pad_token_id = None  # some classes freeze that row of the embedding; ids are random here
    return config


def checked_size(model: Model, module: nn.Module, headless: bool) -> None:
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


def _shape(model: Model) -> dict[str, Any]:
    """Sizes under the names that configs use; a class takes those that it has."""
    bias = model.attention_bias
    return {
        **{"hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers},
        **{"num_attention_heads": model.num_attention_heads, "vocab_size": model.vocab_size},
        **{"num_key_value_heads": model.num_key_value_heads, "head_dim": model.head_dim},
        **{"intermediate_size": model.intermediate_size},
        **{"max_position_embeddings": model.max_position_embeddings},
        **{"tie_word_embeddings": model.tie_word_embeddings, "attention_bias": bias.qkv},
        **{"mlp_bias": model.mlp_bias, "use_qkv_bias": bias.qkv},
    }
