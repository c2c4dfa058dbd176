"""How much work a pass of a model is: multiplications, bytes to read, what attention looks at.

Seconds come of it in speed.py; the constants between the two are in catalog/speed.json.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fitcheck.model import Model


class Work(NamedTuple):
    """Work of some tokens: FLOPs of linear layers and of attention, layer widths passed.

    `widths` counts layer x hidden size for each token: what norms, activations, residuals and
    casts, which are bound by bandwidth, scale with.
    """

    linear: float
    attention: float
    widths: float

    def times(self, linear: float, others: float) -> Work:
        return Work(self.linear * linear, self.attention * others, self.widths * others)


@lru_cache(maxsize=2048)
def block_params(model: Model) -> int:
    """Parameters that multiply every token: no embedding, no head, of a mixture the active ones."""
    every = model.params_active or model.params_text or text_params(model)
    return max(0, every - (model.params_embedding or 0) - model.head_params)


def text_params(model: Model) -> int:
    return int(model.params - (model.params_vision_audio or 0))


def forward(model: Model, rows: int, tokens: int, past: int = 0) -> Work:
    """A forward pass of `rows` sequences of `tokens` each, `past` tokens before them; no head."""
    number = rows * tokens
    return Work(
        2.0 * block_params(model) * number,
        rows * tokens * attention_flops(model, tokens + past),
        number * (model.num_layers or 0) * (model.hidden_size or 0),
    )


@lru_cache(maxsize=8192)
def attention_flops(model: Model, length: int) -> float:
    """FLOPs of scores and their sums for one token that looks at `length` others, 4 per element.

    Counted over the whole square, as in llm-foundry's MFU: causal kernels skip half of it.
    """
    width = query_width(model)
    groups = model.kv_cache_groups
    if groups is None:
        return 4.0 * (model.num_layers or 0) * length * width
    return sum(4.0 * g.layers * min(length, g.window or length) * width for g in groups)


def query_width(model: Model) -> float:
    """Width of all heads together; MLA: the mean of what scores and what values are made of."""
    heads, attention = model.num_attention_heads or 0, model.attention
    if attention is not None and attention.kv_lora_rank is not None:
        keys = (attention.qk_nope_head_dim or 0) + (attention.qk_rope_head_dim or 0)
        return heads * (keys + (attention.v_head_dim or 0)) / 2
    return heads * float(model.head_dim or 0)


def head_flops(model: Model, tokens: int) -> float:
    """The projection of some positions to the vocabulary."""
    return 2.0 * tokens * (model.vocab_size or 0) * model.embedding_width


def share_read(model: Model, rows: int) -> float:
    """Share of the weights that one decode step of `rows` sequences reads.

    An untied embedding is looked up, not read. Of a mixture each row visits experts_per_token of
    num_experts, so B rows visit 1 - (1 - k/E)^B of them when they choose alike.
    """
    every = text_params(model)
    read = every - (0 if model.tie_word_embeddings else model.params_embedding or 0)
    moe = model.moe
    if moe is None or not model.params_active or model.params_active >= every:
        return read / model.params
    share = min(1.0, moe.experts_per_token / moe.num_experts)
    experts = (every - model.params_active) / max(1e-9, 1 - share)
    return (read - experts * (1 - share) ** rows) / model.params


def training_passes(full: bool, checkpointing: bool) -> int:
    """Forwards that a forward and its backward cost: gradients of inputs one, of weights one more,

    checkpointing's second forward one. (Attention has no weights: its backward is always two.)
    """
    return 2 + full + checkpointing
