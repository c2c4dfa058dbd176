"""The decoder layer of each architecture, written as its own code is, on a Tape.

The lines follow transformers' modeling code (llama, qwen3, gemma3, ...), so that a tensor which lives
one line too long there lives one line too long here. `LAYOUTS` names the parts; what a model_type
does differently from Llama stands in `Decoder.layer`, `mlp` and `attention`.
"""

from __future__ import annotations

from fitcheck.heads import Heads
from fitcheck.layouts import LAYOUTS, Layout
from fitcheck.model import Model
from fitcheck.tape import Buffer
from fitcheck.weights import has_closed_form

# Architectures whose layers were compared with transformers' own, allocation by allocation.
COVERED = frozenset({"llama", "qwen2"})


def covered(model: Model, tuning: str = "full") -> str:
    """What of the model the estimate does not cover, in words; empty when it covers all."""
    if model.model_type not in COVERED or not has_closed_form(model):
        return f"the architecture {model.model_type}"
    return ""


class Decoder(Heads):
    """Decoder layers and, from Heads, what comes before and after them."""

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.model.model_type]

    def attention(self, x: Buffer) -> Buffer:
        m, layout = self.model, self.layout
        dim, heads, kv_heads = m.head_dim, m.num_attention_heads, m.num_key_value_heads
        q = self.linear("q_proj", x, m.hidden_size, heads * dim)
        k = self.linear("k_proj", x, m.hidden_size, kv_heads * dim)
        v = self.linear("v_proj", x, m.hidden_size, kv_heads * dim)
        if m.qk_norm:
            q = self.norm(q, dim, self.tokens * heads)
            k = self.norm(k, dim, self.tokens * kv_heads)
        turned_q, turned_k = self.rope(q, heads * dim), self.rope(k, kv_heads * dim)
        q, k = turned_q, turned_k
        del turned_q, turned_k
        out = self.attention_core(q, k, v, heads, kv_heads, dim)
        return self.linear(layout.out, out, heads * dim, m.hidden_size)

    def mlp(self, x: Buffer) -> Buffer:
        m, layout = self.model, self.layout
        gate = self.linear("gate_proj", x, m.hidden_size, m.intermediate_size)
        active = self.keeping_input("act", gate)
        del gate
        up = self.linear("up_proj", x, m.hidden_size, m.intermediate_size)
        product = self.mul(active, up)
        del active, up
        return self.linear(layout.down, product, m.intermediate_size, m.hidden_size)

    def layer(self, x: Buffer) -> Buffer:
        normed = self.norm(x)
        out = self.attention(normed)
        x = self.add(x, out)
        del normed, out
        normed = self.norm(x)
        normed = self.mlp(normed)
        return self.add(x, normed)
