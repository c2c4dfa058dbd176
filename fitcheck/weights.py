"""Every parameter tensor of a model, as transformers 5.x loads it.

Parameter counts, LoRA sizes, quantized sizes, gradients and the rounding of single tensors by the
allocator all derive from this list. A part of a model (attention, mlp, mixture, norms) is one
function driven by the row's fields; how a `model_type` deviates from Llama is one entry of LAYOUTS.

>>> sum(weight.params for weight in weights(llama_3_1_8b))      # doctest: +SKIP
8030261248
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from fitcheck.errors import FitCheckError
from fitcheck.layouts import LAYOUTS, Layout
from fitcheck.model import Model, Weight


def has_weights(model: Model) -> bool:
    """Whether `weights(model)` knows the tensors: the row lists them, or a closed form does."""
    return model.tensors is not None or has_closed_form(model)


def has_closed_form(model: Model) -> bool:
    """Whether the tensors follow from the row's sizes alone."""
    return model.tensors is None and model.model_type in LAYOUTS and model.norm_type is not None


@lru_cache(maxsize=1024)
def weights(model: Model) -> tuple[Weight, ...]:
    """The parameter tensors of `model` as loaded; their sum is `model.params`.

    FitCheckError where only the total is known (`has_weights` says so beforehand).
    """
    if model.tensors is not None:
        return model.tensors
    if not has_closed_form(model):
        raise FitCheckError(
            f"{model.id}: the architecture {model.model_type!r} has no closed form; "
            "only its parameters are counted, its tensors are unknown",
            "choose a model whose row is verified",
        )
    return tuple(_weights(model, LAYOUTS[model.model_type]))


def _weights(model: Model, layout: Layout) -> Iterator[Weight]:
    if model.params_vision_audio:
        yield Weight("tower", (model.params_vision_audio,), 1, "tower")
    yield from _embeddings(model, layout)
    layers = model.num_layers
    if model.attention.kv_lora_rank is None:
        yield from _attention(model, layout, layers)
    else:
        yield from _latent_attention(model, layout, layers)
    mixtures = model.moe.moe_layers if model.moe else 0
    if mixtures < layers:
        yield from _mlp(model, layout, layers - mixtures)
    if mixtures:
        yield from _mixture(model, layout, mixtures)
    one = model.norms_per_layer == 1 and layout.only_norm
    for name in (layout.only_norm,) if one else layout.norms:
        yield from _norm(model, layout, name, model.hidden_size, layers)
    if not _is_post_norm_opt(model):
        yield from _norm(model, layout, layout.final_norm, model.hidden_size, 1)
    yield from _head(model)


def _embeddings(model: Model, layout: Layout) -> Iterator[Weight]:
    hidden, width = model.hidden_size, model.embedding_width
    yield Weight(layout.embedding, (model.vocab_size, width), 1, "embedding")
    if layout.positions:
        rows = model.max_position_embeddings + layout.extra_positions
        yield Weight(layout.positions, (rows, hidden), 1, "position")
    if layout.embedding_norm:
        yield from _norm(model, layout, layout.embedding_norm, hidden, 1)
    if width != hidden:
        yield from _linear("project_out", width, hidden, 1)
        yield from _linear("project_in", hidden, width, 1)


def _attention(model: Model, layout: Layout, layers: int) -> Iterator[Weight]:
    bias, place, hidden = model.attention_bias, layout.attention, model.hidden_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    sizes = (queries, keys, keys) if len(layout.qkv) == 3 else (queries + 2 * keys,)
    for name, rows in zip(layout.qkv, sizes, strict=True):
        yield from _linear(f"{place}.{name}", rows, hidden, layers, bias.qkv, layout.conv1d)
    yield from _linear(f"{place}.{layout.out}", hidden, queries, layers, bias.out, layout.conv1d)
    if layout.attention_gate:
        yield from _linear(f"{place}.{layout.attention_gate}", queries, hidden, layers)
    if layout.sinks:
        yield Weight(f"{place}.sinks", (model.num_attention_heads,), layers, "other")
    if model.qk_norm:
        yield from _qk_norms(model, layout, layers)


def _qk_norms(model: Model, layout: Layout, layers: int) -> Iterator[Weight]:
    heads = (model.num_attention_heads, model.num_key_value_heads)
    for name, count in zip(layout.qk_norms, heads, strict=True):
        shape, copies = {
            "shared": ((model.head_dim,), layers),  # one norm, applied to each head
            "wide": ((count * model.head_dim,), layers),  # one norm over all heads together
            "table": ((count, model.head_dim), layers),  # a row a head
            "modules": ((model.head_dim,), layers * count),  # a module a head
        }[layout.qk_norm_style]
        yield Weight(f"{layout.attention}.{name}", shape, copies, "norm")


def _latent_attention(model: Model, layout: Layout, layers: int) -> Iterator[Weight]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): q and kv of low rank."""
    mla, place, hidden = model.attention, layout.attention, model.hidden_size
    rank, rope, nope, value = (
        mla.kv_lora_rank or 0,
        mla.qk_rope_head_dim or 0,
        mla.qk_nope_head_dim or 0,
        mla.v_head_dim or 0,
    )
    heads = model.num_attention_heads
    queries = heads * (nope + rope)
    if mla.q_lora_rank is None:
        yield from _linear(f"{place}.q_proj", queries, hidden, layers)
    else:
        yield from _linear(f"{place}.q_a_proj", mla.q_lora_rank, hidden, layers)
        yield Weight(f"{place}.q_a_layernorm", (mla.q_lora_rank,), layers, "norm")
        yield from _linear(f"{place}.q_b_proj", queries, mla.q_lora_rank, layers)
    yield from _linear(f"{place}.kv_a_proj_with_mqa", rank + rope, hidden, layers)
    yield Weight(f"{place}.kv_a_layernorm", (rank,), layers, "norm")
    yield from _linear(f"{place}.kv_b_proj", heads * (nope + value), rank, layers)
    yield from _linear(f"{place}.o_proj", hidden, heads * value, layers)


def _mlp(model: Model, layout: Layout, layers: int) -> Iterator[Weight]:
    hidden, inner = model.hidden_size, model.intermediate_size
    place = f"{layout.mlp}." if layout.mlp else ""
    up = layout.up or (("gate_proj", "up_proj") if model.mlp_gated else ("up_proj",))
    rows = inner * (2 if model.mlp_gated else 1) // len(up)
    for name in up:
        yield from _linear(place + name, rows, hidden, layers, model.mlp_bias, layout.conv1d)
    yield from _linear(place + layout.down, hidden, inner, layers, model.mlp_bias, layout.conv1d)
    for name in layout.slopes:
        yield Weight(place + name, (1,), layers, "other")


def _mixture(model: Model, layout: Layout, layers: int) -> Iterator[Weight]:
    moe, place, hidden = model.moe, layout.mixture, model.hidden_size
    assert moe is not None  # the caller counted its layers
    experts, inner = moe.num_experts, moe.moe_intermediate_size
    kind = "linear" if layout.router_is_linear else "router"
    yield Weight(f"{place}.{layout.router}", (experts, hidden), layers, kind)
    if layout.router_bias:
        shape = (*layout.router_bias_rows, experts)
        yield Weight(f"{place}.{layout.router_bias}", shape, layers, "router")
    for name, shape in _expert_shapes(layout.experts, experts, inner, hidden).items():
        yield Weight(f"{place}.experts.{name}", shape, layers, "expert")
        if model.mlp_bias:  # only gpt-oss
            yield Weight(f"{place}.experts.{name}_bias", (experts, shape[-1]), layers, "bias")
    if moe.shared_width:
        shared = f"{place}.{layout.shared_experts}"
        yield from _linear(f"{shared}.gate_proj", moe.shared_width, hidden, layers)
        yield from _linear(f"{shared}.up_proj", moe.shared_width, hidden, layers)
        yield from _linear(f"{shared}.down_proj", hidden, moe.shared_width, layers)
        if layout.shared_expert_gate:
            yield from _linear(f"{place}.{layout.shared_expert_gate}", 1, hidden, layers)


def _expert_shapes(style: str, experts: int, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    if style == "flat":
        return dict.fromkeys(("mlp.w1", "mlp.v1", "mlp.w2"), (experts * inner, hidden))
    if style == "transposed":
        return {
            "gate_up_proj": (experts, hidden, 2 * inner),
            "down_proj": (experts, inner, hidden),
        }
    return {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}


def _norm(model: Model, layout: Layout, name: str, width: int, copies: int) -> Iterator[Weight]:
    if model.norm_type == "LayerNorm without weights":
        return
    yield Weight(name, (width,), copies, "norm")
    if model.norm_type == "LayerNorm" and layout.norm_bias:
        yield Weight(f"{name}.bias", (width,), copies, "norm")


def _head(model: Model) -> Iterator[Weight]:
    if not model.tie_word_embeddings:
        yield Weight("lm_head", (model.vocab_size, model.embedding_width), 1, "head")
    if model.lm_head_bias:
        yield Weight("lm_head.bias", (model.vocab_size,), 1, "head")


def _linear(
    name: str, rows: int, columns: int, copies: int, bias: bool = False, conv1d: bool = False
) -> Iterator[Weight]:
    """An nn.Linear from `columns` to `rows` features; Conv1D stores the transpose."""
    yield Weight(name, (columns, rows) if conv1d else (rows, columns), copies, "linear")
    if bias:
        yield Weight(f"{name}.bias", (rows,), copies, "bias")


def _is_post_norm_opt(model: Model) -> bool:
    """OPT-350m, the one OPT with norms after the blocks, has no final norm."""
    return model.model_type == "opt" and model.embedding_width != model.hidden_size
