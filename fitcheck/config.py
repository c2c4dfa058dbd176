"""A config.json as a Model: the sizes it states, its class's defaults, its architecture's traits.

    model_from(config, "org/name")       # FitCheckError where the architecture is not known

Untrusted input: every size is checked against a bound, and what is missing is an error, never a
guess. catalog/configs.json (`python -m fitcheck.bench.defaults`) has the names and defaults of the
config classes, since a config.json may leave out what equals its class's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.files import read
from fitcheck.layouts import LAYOUTS
from fitcheck.model import Attention, AttentionBias, KVGroup, Model, MoE
from fitcheck.weights import has_closed_form, weights

# Sizes and flags that are read, under the names most config classes use.
NAMES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings"),
    *("max_position_embeddings", "attention_bias", "mlp_bias", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "sliding_window_pattern"),
    *("global_attn_every_n_layers", "use_qkv_bias", "qkv_bias", "use_bias", "attention_out_bias"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_experts_per_tok", "moe_k", "moe_topk", "moe_intermediate_size", "n_shared_experts"),
    *("num_shared_experts", "moe_num_shared_experts", "shared_expert_intermediate_size"),
    *("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("ffn_dim", "word_embed_proj_dim", "num_kv_heads", "ffn_hidden_size", "multi_query"),
    *("new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn", "bias", "n_inner"),
    *("use_qk_norm", "qk_layernorm", "use_parallel_residual", "lm_head_bias", "expansion_ratio"),
    *("window_size", "decoder_sparse_step", "num_shared_expert"),
)
LARGEST = {"num_hidden_layers": 2**10, "num_attention_heads": 2**12, "hidden_size": 2**17}
LARGEST |= {"num_experts": 2**14, "vocab_size": 2**24, "intermediate_size": 2**20}
# Every n-th layer attends to all where neither config nor class says how many (transformers 5.24).
EVERY = {"gemma2": 2, "gpt_oss": 2, "vaultgemma": 2, "cohere2": 4, "olmo3": 4, "exaone4": 4}
EVERY |= {"exaone_moe": 4, "gemma3": 6, "gemma3_text": 6, "mellum": 4}
WINDOWED = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")  # every layer, if it has a window
VISION = ("gemma3", "kimi_k25", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


class Reader:
    """The fields of one config, under canonical names."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        if not isinstance(config, Mapping):
            raise _bad(name, "it is no JSON object")
        self.name, self.top = name, config
        self.model_type: Any = config.get("model_type")
        text = config.get("text_config")
        self.own = text if isinstance(text, Mapping) else config
        known = read("configs.json")["configs"]
        if isinstance(self.model_type, str) and self.model_type not in known:
            inner = self.own.get("model_type")
            self.model_type = inner if isinstance(inner, str) and inner in known else ""
        self.model_type = self.model_type if isinstance(self.model_type, str) else ""
        self.table = known.get(self.model_type)

    def get(self, name: str) -> Any:
        """A field as it stands there, else its class's default."""
        assert self.table
        for key in (self.table["names"].get(name), name):
            if key and key in self.own:
                return self.own[key]  # null too: it is not the class's default
        return self.table["defaults"].get(name)

    def size(self, *names: str, least: int = 1) -> int:
        """The first of these that is set: a whole number within its bound."""
        for name in names:
            value = self.get(name)
            if value is not None and value is not False:
                most = LARGEST.get(name, 2**24)
                if type(value) is not int or not least <= value <= most:
                    raise _bad(self.name, f"{name} is {_shown(value)}")
                return value
        raise _bad(self.name, f"it has no {names[0]}")

    def maybe(self, *names: str) -> int:
        """As size, 0 where none of them is set."""
        found = [name for name in names if self.get(name) not in (None, False, 0, [])]
        return self.size(*found) if found else 0

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise _bad(self.name, f"{name} is {_shown(value)}")
        return bool(value)

    def trait(self, name: str) -> Any:
        assert self.table
        return self.table["traits"].get(name)


def model_from(config: Mapping[str, Any], name: str, source: str = "config.json") -> Model:
    """The Model of a config.json; status `config`, its parameters from the closed form.

    FitCheckError where the config is malformed, or of an architecture that is not understood.
    """
    c = Reader(config, name)
    if c.table is None:
        if found := _sibling(c, name, source):
            return found
        raise FitCheckError(
            f"{name}: the architecture {str(c.top.get('model_type'))[:60]!r} is not understood",
            "choose a model that `fitcheck models` lists, or one built like it",
        )
    heads, hidden = c.size("num_attention_heads"), c.size("hidden_size")
    layers, vocab = c.size("num_hidden_layers"), c.size("vocab_size")
    kv_heads = _kv_heads(c, heads)
    latent, length = _latent(c), c.maybe("max_position_embeddings") or None
    if LAYOUTS[c.model_type].positions:  # a table of them
        length = c.size("max_position_embeddings")
    head_dim = latent["head_dim"] if latent else c.maybe("head_dim") or hidden // heads
    if heads % kv_heads:
        raise _bad(name, f"{heads} heads do not share {kv_heads} heads of keys and values")
    kind = "MHA" if heads == kv_heads else "MQA" if kv_heads == 1 else "GQA"
    groups, window = _groups(c, layers, kv_heads * head_dim, latent)
    moe = _moe(c, layers)
    if latent:
        attention = Attention("MLA", c.trait("position"), **latent["ranks"])
    else:
        attention = Attention(kind, c.trait("position"))
    facts: dict[str, Any] = {
        **{"id": name, "family": name.rpartition("/")[2], "name": name.rpartition("/")[2]},
        **{"model_type": c.model_type, "status": "config", "sources": (source,)},
        **{"checked": "counted from its config.json by the closed form", "params": 0},
        **{"hidden_size": hidden, "num_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab},
        **{"intermediate_size": _inner(c, hidden), "tie_word_embeddings": _tied(c)},
        **{"params_embedding": vocab * (c.maybe("word_embed_proj_dim") or hidden)},
        **{"max_position_embeddings": length},
        **{"attention": attention, "sliding_window": window, "kv_cache_groups": groups},
        **{"layer_type_counts": {g.kind: g.layers for g in groups} if len(groups) > 1 else None},
        **{"attention_bias": _bias(c), "moe": moe, "norms_per_layer": _norms(c)},
        **{"lm_head_bias": c.flag("lm_head_bias") or bool(c.trait("lm_head_bias"))},
        **{"mlp_bias": c.flag("mlp_bias") or bool(c.trait("mlp_bias")), "qk_norm": _qk_norm(c)},
        **{"mlp_gated": c.trait("mlp_gated"), "activation": c.trait("activation")},
        **{"norm_type": c.trait("norm_type"), "architecture_class": c.trait("architecture_class")},
    }
    model = counted(Model(**facts))
    if c.model_type in VISION:
        model = replace(model, note="its towers are not in its config's sizes")
    return model


def counted(model: Model) -> Model:
    """The model with the parameters that its closed form has."""
    assert has_closed_form(model)
    every = weights(model)
    params = sum(weight.params for weight in every)
    if model.moe is None:
        return replace(model, params=params)
    experts = sum(weight.params for weight in every if ".experts." in weight.name)
    idle = experts * (model.moe.num_experts - model.moe.experts_per_token)
    return replace(model, params=params, params_active=params - idle // model.moe.num_experts)


def _kv_heads(c: Reader, heads: int) -> int:
    if c.model_type == "falcon" and not c.flag("new_decoder_architecture"):
        return 1 if c.flag("multi_query") else heads
    if c.model_type == "gpt_bigcode":
        return 1 if c.flag("multi_query") else heads
    if c.model_type == "dbrx":
        return _nested(c, "attn_config", "kv_n_heads")
    return c.maybe("num_key_value_heads", "num_kv_heads") or heads


def _nested(c: Reader, key: str, name: str) -> int:
    inner = c.own.get(key)
    value = inner.get(name) if isinstance(inner, Mapping) else None
    if type(value) is not int or not 0 < value <= 2**20:
        raise _bad(c.name, f"{key}.{name} is {_shown(value)}")
    return value


def _inner(c: Reader, hidden: int) -> int:
    if c.model_type == "dbrx":
        return _nested(c, "ffn_config", "ffn_hidden_size")
    if c.model_type == "mpt":
        return hidden * c.size("expansion_ratio")
    return c.maybe("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden


def _tied(c: Reader) -> bool:
    for place in (c.top, c.own):  # a multimodal config says it outside or inside
        if isinstance(place.get("tie_word_embeddings"), bool):
            return bool(place["tie_word_embeddings"])
    return c.flag("tie_word_embeddings")


def _bias(c: Reader) -> AttentionBias:
    fixed = c.trait("attention_bias")
    names = ("attention_bias", "use_qkv_bias", "qkv_bias", "use_bias", "bias")
    said = [c.flag(name) for name in names if c.get(name) is not None]
    if fixed is not None and not said:
        return AttentionBias(*fixed)
    qkv = any(said)
    if c.get("attention_out_bias") is not None:
        return AttentionBias(qkv, c.flag("attention_out_bias"))
    return AttentionBias(qkv, qkv and c.trait("out_bias"))


def _norms(c: Reader) -> int:
    if c.model_type == "falcon":
        if c.flag("new_decoder_architecture"):
            return c.maybe("num_ln_in_parallel_attn") or 2
        return 1 if c.flag("parallel_attn") else 2
    if c.model_type == "stablelm":
        return 1 if c.flag("use_parallel_residual") else 2
    return int(c.trait("norms_per_layer"))


def _qk_norm(c: Reader) -> bool:
    fixed = c.trait("qk_norm")
    return c.flag("use_qk_norm") or c.flag("qk_layernorm") if fixed is None else bool(fixed)


def _latent(c: Reader) -> dict[str, Any]:
    """Ranks of multi-head latent attention; empty where there is none."""
    if not c.maybe("kv_lora_rank"):
        return {}
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    ranks: dict[str, Any] = {name: c.size(name) for name in names}
    ranks["q_lora_rank"] = c.maybe("q_lora_rank") or None  # None: queries are projected directly
    return {"ranks": ranks, "head_dim": ranks["qk_rope_head_dim"] + ranks["qk_nope_head_dim"]}


def _groups(
    c: Reader, layers: int, width: int, latent: Mapping[str, Any]
) -> tuple[tuple[KVGroup, ...], int | None]:
    """What the layers cache for a token, and the window of those that have one."""
    if latent:
        ranks = latent["ranks"]
        return (KVGroup(layers, "mla", ranks["kv_lora_rank"] + ranks["qk_rope_head_dim"], 0),), None
    window = c.maybe("sliding_window") or None
    sliding = _sliding(c, layers) if window else 0
    if c.model_type == "gpt_neo":
        return (KVGroup(layers, "full_attention", width, width),), c.maybe("window_size") or None
    found = []
    if sliding:
        found.append(KVGroup(sliding, "sliding_attention", width, width, window))
    if sliding < layers:
        found.append(KVGroup(layers - sliding, "full_attention", width, width))
    return tuple(found), window if sliding else None


def _sliding(c: Reader, layers: int) -> int:
    kinds = c.own.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return sum(kind == "sliding_attention" for kind in kinds)
    if c.model_type in WINDOWED:
        return layers
    if c.model_type.startswith("qwen"):
        return layers - c.maybe("max_window_layers") if c.flag("use_sliding_window") else 0
    pattern = c.own.get("sliding_window_pattern", c.own.get("_sliding_window_pattern"))
    every = len(pattern) if isinstance(pattern, str) else pattern
    every = every or c.maybe("global_attn_every_n_layers") or EVERY.get(c.model_type, 0)
    if type(every) is not int or every < 0:
        raise _bad(c.name, f"sliding_window_pattern is {_shown(pattern)}")
    return layers - layers // every if every else 0


def _moe(c: Reader, layers: int) -> MoE | None:
    if c.model_type == "dbrx":
        inner = _nested(c, "ffn_config", "ffn_hidden_size")
        experts = _nested(c, "ffn_config", "moe_num_experts")
        chosen = _nested(c, "ffn_config", "moe_top_k")
        return MoE(experts, chosen, inner, moe_layers=layers, dense_layers=0)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = c.maybe(*names)
    if not experts or (c.model_type == "hunyuan_v1_dense"):
        return None
    chosen = _first(c, "num_experts_per_tok", "moe_k", "moe_topk")
    inner = _first(c, "moe_intermediate_size") or c.size("intermediate_size")
    shared = c.maybe("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    shared = shared or _first(c, "num_shared_expert")
    if c.model_type == "hunyuan_v1_moe":  # transformers' class always has one
        shared = shared or 1
    width = c.maybe("shared_expert_intermediate_size") or None
    if width:
        shared = 1
    if not 0 < chosen <= experts:
        raise _bad(c.name, f"{chosen} of {experts} experts a token")
    dense = _dense(c, layers)
    return MoE(
        experts, chosen, inner, shared, width,
        moe_layers=layers - dense, dense_layers=dense, first_k_dense=dense or None,
    )  # fmt: skip


def _first(c: Reader, *names: str) -> int:
    """A size that some configs state for each layer; they are alike."""
    for name in names:
        value = c.get(name)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
            if type(value) is not int or not 0 < value <= 2**20:
                raise _bad(c.name, f"{name} is {_shown(value)}")
            return value
    return c.maybe(*names)


def _dense(c: Reader, layers: int) -> int:
    """Layers without a mixture."""
    kinds = c.own.get("mlp_layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return sum(kind == "dense" for kind in kinds)
    only = c.own.get("mlp_only_layers")
    step = c.maybe("decoder_sparse_step")
    if isinstance(only, list) and (only or step > 1):
        sparse = [i for i in range(layers) if i not in only and (i + 1) % (step or 1) == 0]
        return layers - len(sparse)
    dense = c.maybe("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
    if dense > layers:
        raise _bad(c.name, f"{dense} dense layers of {layers}")
    return dense


SAME = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")


def is_unknown(config: Mapping[str, Any], name: str) -> bool:
    """Whether neither a closed form nor a row of the catalog tells the tensors of a config."""
    c = Reader(config, name)
    return c.table is None and _sibling(c, name, "") is None


def _sibling(c: Reader, name: str, source: str) -> Model | None:
    """A row of the catalog of that architecture and those sizes, under this name."""
    shown = c.top.get("model_type")
    if not isinstance(shown, str):
        raise _bad(name, "it names no model_type")
    kinds = {shown, c.own.get("model_type")}
    for row in catalog.models():
        if row.model_type in kinds and row.num_layers == c.own.get("num_hidden_layers"):
            same = [c.own.get(key) for key in SAME] == [getattr(row, key) for key in SAME]
            if same and row.is_verified:
                return replace(
                    row, id=name, name=name.rpartition("/")[2], status="config", sources=(source,),
                    checked=f"its config has the sizes of {row.id}", sibling=row.sibling or row.id,
                )  # fmt: skip
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _bad(name: str, why: str) -> FitCheckError:
    return FitCheckError(
        f"{name}: its config.json cannot be used: {why}",
        "download it again, or compare it with the model's page on the Hub",
    )
