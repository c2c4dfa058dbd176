"""The decoder layer of each architecture, written as its own code is, on a Tape.

The lines follow transformers' modeling code (llama, qwen3, gemma3, ...), so that a tensor which
lives one line too long there lives one line too long here. flows.py says which methods a model_type
uses.
"""

from __future__ import annotations

from fitcheck import coefficients
from fitcheck.attention import Attention
from fitcheck.heads import Heads
from fitcheck.mixture import Mixture
from fitcheck.model import Model
from fitcheck.tape import Buffer

# (architecture, LoRA targets) that PEFT 0.21 cannot adapt, or not run.
NO_LORA = {("phimoe", "all-linear"), ("afmoe", "attention")}


def covered(
    model: Model, tuning: str = "full", targets: str | tuple[str, ...] = "all-linear"
) -> str:
    """What of the model the estimate does not cover, in words; empty when it covers all."""
    if coefficients.is_traced(model):
        return coefficients.missing(model, tuning, targets)
    if tuning in ("lora", "qlora") and (model.model_type, targets) in NO_LORA:
        return f"LoRA on {targets} of the architecture {model.model_type}, where PEFT fails"
    return ""


class Decoder(Heads, Attention, Mixture):
    """Decoder layers and, from Heads, what comes before and after them."""

    dense = False  # this layer has no experts, though others have

    def layer(self, x: Buffer) -> Buffer:
        before = self.earlier_weights() if self.flow.returns_weights else None
        out = getattr(self, self.flow.block)(x)
        del before  # alive until here
        self.returned = None
        return out  # type: ignore[no-any-return]

    def earlier_weights(self) -> Buffer | None:
        """Attention weights of the layer before, while nothing is saved for backward (gpt_neo)."""
        length = self.tokens // self.rows
        if self.tape.grad or (self.flow.attention == "falcon" and self.setting.kernel != "eager"):
            return None
        size = self.setting.compute if self.setting.autocast else self.setting.stream
        weights = self.tokens * self.model.num_attention_heads * (length + self.past) * size
        return self.tape.new(weights, size, name="attention weights of the layer before")

    def pre_norm(self, x: Buffer) -> Buffer:
        """llama: a norm before attention, one before the MLP."""
        out = self.norm(x)
        out = self.attention(out)
        x = self.add(x, self.scale(out) if self.flow.scaled_stream else out)
        del out
        out = self.norm(x)
        out = self.mlp(out)
        return self.add(x, self.scale(out) if self.flow.scaled_stream else out)

    def gpt(self, x: Buffer) -> Buffer:
        """gpt2: as llama, but every result has a name of its own and stays."""
        normed = self.norm(x)
        attended = self.attention(normed)
        x = self.add(attended, x)
        del normed
        normed = self.norm(x)
        fed = self.mlp(normed)
        return self.add(x, fed)

    def stablelm(self, x: Buffer) -> Buffer:
        """stablelm: one after the other, or beside each other where a layer has one norm."""
        normed = self.norm(x)
        attended = self.attention(normed)
        if self.model.norms_per_layer == 1:
            fed = self.mlp(normed)
            out = self.add(x, attended)
            return self.add(out, fed)
        x = self.add(x, attended)
        fed = self.mlp(self.norm(x))
        return self.add(x, fed)

    def bloom_block(self, x: Buffer) -> Buffer:
        """bloom: attention and MLP add the residual stream themselves."""
        out = self.norm(x)
        attended = self.bloom(out, x)
        out = self.norm(attended)
        m = self.model
        out = self.feed(self.layout.up[0], out, m.hidden_size, m.intermediate_size)
        out = self.activation(out)
        fed = self.feed(self.layout.down, out, m.intermediate_size, m.hidden_size)
        return self.add(attended, fed)

    def falcon_block(self, x: Buffer) -> Buffer:
        """falcon: attention and MLP beside each other, with one norm or two."""
        normed = self.norm(x)
        beside = self.norm(x) if self.model.norms_per_layer == 2 else normed
        attended = self.attention(normed)
        fed = self.mlp(beside)
        return self.add(x, self.tape.add_into(fed, attended))

    def opt(self, x: Buffer) -> Buffer:
        """opt: the MLP within the layer's own code; OPT-350m has the norms behind."""
        m, before = self.model, self.model.embedding_width == self.model.hidden_size
        out = self.norm(x) if before else x
        out = self.attention(out)
        x = out = self.add(x, out)
        if not before:
            x = out = self.norm(out)
        if before:
            out = self.norm(x)
        out = self.feed("fc1", out, m.hidden_size, m.intermediate_size)
        out = self.activation(out)
        out = self.feed("fc2", out, m.intermediate_size, m.hidden_size)
        out = self.add(x, out)
        return out if before else self.norm(out)

    def post_norm(self, x: Buffer) -> Buffer:
        """olmo2: a norm after attention, one after the MLP."""
        out = self.attention(x)
        out = self.norm(out)
        x = self.add(x, out)
        del out
        out = self.mlp(x)
        out = self.norm(out)
        return self.add(x, out)

    def sandwich(self, x: Buffer) -> Buffer:
        """gemma2: a norm before and after attention, before and after the MLP."""
        out = self.norm(x)
        out = self.attention(out)
        out = self.norm(out)
        x = self.add(x, out)
        del out
        out = self.norm(x)
        out = self.mlp(out)
        out = self.norm(out)
        return self.add(x, out)

    def parallel(self, x: Buffer) -> Buffer:
        """phi: one norm, attention and MLP beside each other."""
        normed = self.norm(x)
        attended = self.attention(normed)
        fed = self.mlp(normed)
        out = self.add(attended, fed)
        return self.add(out, x)

    def parallel_norms(self, x: Buffer) -> Buffer:
        """gpt_neox: attention and MLP beside each other, a norm before each."""
        normed = self.norm(x)
        attended = self.attention(normed)
        del normed
        normed = self.norm(x)
        fed = self.mlp(normed)
        del normed
        out = self.add(fed, attended)
        return self.add(out, x)

    def dense_layer(self, x: Buffer) -> Buffer:
        """A layer without experts in a model that has some."""
        self.dense = True
        return self.layer(x)

    def mlp(self, x: Buffer) -> Buffer:
        if self.model.moe and not self.dense:
            return self.mixture(x)
        return getattr(self, self.flow.mlp)(x)  # type: ignore[no-any-return]

    def feed(self, name: str, x: Buffer, inner: int, outer: int) -> Buffer:
        return self.linear(self.layout.mlp, name, x, inner, outer, self.model.mlp_bias)

    def gated(self, x: Buffer) -> Buffer:
        """llama: down(act(gate(x)) * up(x))."""
        m = self.model
        hidden, inner = m.hidden_size, m.intermediate_size
        gate = self.feed("gate_proj", x, hidden, inner)
        active = self.activation(gate)
        del gate
        up = self.feed("up_proj", x, hidden, inner)
        product = self.mul(active, up)
        del active, up
        return self.feed(self.layout.down, product, inner, hidden)

    def fused_gated(self, x: Buffer) -> Buffer:
        """phi3: gate and up are the halves of one projection."""
        m = self.model
        hidden, inner = m.hidden_size, m.intermediate_size
        fused = self.feed(self.layout.up[0], x, hidden, 2 * inner)
        gate, up = self.tape.split(fused, [fused.bytes // 2] * 2)
        del fused
        active = self.activation(gate)
        up = self.mul(up, active)
        del active
        return self.feed(self.layout.down, up, inner, hidden)

    def plain(self, x: Buffer) -> Buffer:
        """gpt2: down(act(up(x)))."""
        m = self.model
        hidden, inner = m.hidden_size, m.intermediate_size
        x = self.feed(self.layout.up[0] if self.layout.up else "up_proj", x, hidden, inner)
        x = self.activation(x)
        return self.feed(self.layout.down, x, inner, hidden)
