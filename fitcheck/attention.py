"""How queries, keys and values come to be in each architecture, on a Tape."""

from __future__ import annotations

from fitcheck.attend import Attend
from fitcheck.tape import SAME, Buffer


class Attention(Attend):
    """The attention of each architecture; its flow names the methods."""

    def attention(self, x: Buffer) -> Buffer:
        return getattr(self, self.flow.attention)(x)  # type: ignore[no-any-return]

    def project(self, name: str, x: Buffer, outer: int, bias: bool) -> Buffer:
        return self.linear(self.layout.attention, name, x, self.model.hidden_size, outer, bias)

    def output(self, x: Buffer, width: int) -> Buffer:
        m, layout = self.model, self.layout
        bias = m.attention_bias.out
        return self.linear(layout.attention, layout.out, x, width, m.hidden_size, bias)

    def separate(self, x: Buffer) -> Buffer:
        """A projection each for queries, keys and values (llama, qwen3, gemma3, ...)."""
        m, qkv, bias = self.model, self.layout.qkv, self.model.attention_bias.qkv
        dim, heads, kv_heads = m.head_dim, m.num_attention_heads, m.num_key_value_heads
        style = self.flow.qk_norm if m.qk_norm else ""
        q = self.project(qkv[0], x, heads * dim, bias)
        if style == "each":
            q = self.norm(q, dim, self.tokens * heads)
        elif style == "wide":
            q = self.norm(q, heads * dim, self.tokens)
        k = self.project(qkv[1], x, kv_heads * dim, bias)
        if style == "each":
            k = self.norm(k, dim, self.tokens * kv_heads)
        elif style == "wide":
            k = self.norm(k, kv_heads * dim, self.tokens)
        v = self.project(qkv[2], x, kv_heads * dim, bias)
        if style == "all":
            q = self.norm(q, dim, self.tokens * heads)
            k = self.norm(k, dim, self.tokens * kv_heads)
        if self.flow.scaled_queries == "before":
            q = self.scale(q)
        q, k, *rest = self.rope(q, k)
        if style == "rotated":
            q = self.norm(q, dim, self.tokens * heads)
            k = self.norm(k, dim, self.tokens * kv_heads)
        if self.flow.scaled_queries == "after":
            q = self.scale(q)
        return self.finish(q, k, v)

    def fused_slices(self, x: Buffer) -> Buffer:
        """One projection; queries, keys and values are slices of it (phi3)."""
        q, k, v = self.sliced(self.fused(x))
        q, k = self.rope(q, k)
        return self.finish(q, k, v)

    def fused_split(self, x: Buffer) -> Buffer:
        """One projection, then split or chunk: their gradients are joined at once (gpt2)."""
        fused = self.fused(x)
        q, k, v = self.tape.split(fused, self.shares(fused))
        q, k = self.rope(q, k)
        return self.finish(q, k, v)

    def fused(self, x: Buffer) -> Buffer:
        m = self.model
        outer = (m.num_attention_heads + 2 * m.num_key_value_heads) * m.head_dim
        return self.project(self.layout.qkv[0], x, outer, m.attention_bias.qkv)

    def shares(self, fused: Buffer) -> list[int]:
        """Bytes of queries, keys and values in their fused projection."""
        m = self.model
        head = self.tokens * m.head_dim * fused.size
        return [m.num_attention_heads * head] + 2 * [m.num_key_value_heads * head]

    def sliced(self, fused: Buffer) -> list[Buffer]:
        return [self.tape.view(fused, bytes) for bytes in self.shares(fused)]

    def finish(self, q: Buffer, k: Buffer, v: Buffer) -> Buffer:
        m = self.model
        dim, heads = m.head_dim, m.num_attention_heads
        out = self.attend(q, k, v, heads, m.num_key_value_heads, dim, dim)
        return self.output(out, heads * dim)

    def gated_separate(self, x: Buffer) -> Buffer:
        """afmoe: the output is multiplied by a sigmoid of its own projection."""
        m, qkv = self.model, self.layout.qkv
        dim, heads, kv_heads = m.head_dim, m.num_attention_heads, m.num_key_value_heads
        q = self.project(qkv[0], x, heads * dim, False)
        k = self.project(qkv[1], x, kv_heads * dim, False)
        v = self.project(qkv[2], x, kv_heads * dim, False)
        gate = self.project(self.layout.attention_gate, x, heads * dim, False)
        q = self.norm(q, dim, self.tokens * heads)
        k = self.norm(k, dim, self.tokens * kv_heads)
        q, k = self.rope(q, k)
        out = self.attend(q, k, v, heads, kv_heads, dim, dim)
        out = self.mul(out, self.keeping_output("sigmoid", gate))
        return self.output(out, heads * dim)

    def latent(self, x: Buffer) -> Buffer:
        """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): q and kv of low rank."""
        m, tape, place, bias = (
            self.model,
            self.tape,
            self.layout.attention,
            self.model.attention_bias.qkv,
        )
        mla, heads = m.attention, m.num_attention_heads
        rope, nope, value = (
            mla.qk_rope_head_dim or 0,
            mla.qk_nope_head_dim or 0,
            mla.v_head_dim or 0,
        )
        rank, width = mla.kv_lora_rank or 0, heads * (nope + rope)
        if mla.q_lora_rank is None:
            q = self.project("q_proj", x, width, False)
        else:
            low = mla.q_lora_rank
            q = self.norm(self.project("q_a_proj", x, low, bias), low)
            q = self.linear(place, "q_b_proj", q, low, width)
        rest, turned = tape.split(
            q, [q.bytes // (nope + rope) * nope, q.bytes // (nope + rope) * rope]
        )
        both = self.project("kv_a_proj_with_mqa", x, rank + rope, bias)
        latent, shared = tape.split(both, [both.bytes // (rank + rope) * n for n in (rank, rope)])
        latent = self.norm(latent, rank)
        turned, shared = self.rope(turned, shared)
        q = self.cat([rest, turned])
        k, v = self.expanded(latent, shared, rank, rope, nope, value)
        out = self.attend(q, k, v, heads, heads, nope + rope, value)
        return self.output(out, heads * value)

    def expanded(
        self, latent: Buffer, shared: Buffer, rank: int, rope: int, nope: int, value: int
    ) -> list[Buffer]:
        """Keys and values from the latent: keys are written into a new tensor, in two steps."""
        heads, tape = self.model.num_attention_heads, self.tape
        kv = self.linear(self.layout.attention, "kv_b_proj", latent, rank, heads * (nope + value))
        head = self.tokens * heads * kv.size
        own, v = tape.split(kv, [nope * head, value * head])
        bytes = (nope + rope) * head
        k = tape.op("keys", [own, shared], bytes, kv.size, temporary=bytes)
        return [k, v]

    def bloom(self, x: Buffer, residual: Buffer) -> Buffer:
        """ALiBi goes into the product; what the block adds is added here."""
        m, tape = self.model, self.tape
        fused = self.fused(x)
        q, k, v = self.sliced(fused)
        if self.rows > 1:
            q, k, v = (self.copy("reshape", part) for part in (q, k, v))
        count = self.tokens * m.num_attention_heads * (self.tokens // self.rows + self.past)
        c = self.product_size(q)
        scores = tape.op("scores", [q, k], count * c, c, saved=self.factors(q, k))
        masked = self.masked(scores)
        self.returned = self.cast(self.softmax(masked), q.size)
        context = self.weigh(self.returned, v, m.hidden_size, 0)
        context = self.copy("merge heads", context)
        out = self.output(context, m.hidden_size)
        return self.add(residual, out)

    def mpt(self, x: Buffer) -> Buffer:
        """ALiBi is added to the scores in fp32."""
        m, tape = self.model, self.tape
        fused = self.fused(x)
        q, k, v = tape.split(fused, self.shares(fused))
        count = self.tokens * m.num_attention_heads * (self.tokens // self.rows + self.past)
        scores = self.scale(self.scores(q, k, count, 1))
        scores = tape.op("alibi", [scores], 4 * count, 4, shares=SAME)
        scores = tape.op("masked_fill", [scores], 4 * count, 4)
        self.returned = self.cast(self.softmax(scores), v.size)
        out = self.weigh(self.returned, v, m.hidden_size, 1)
        out = self.copy("contiguous", out)
        return self.output(out, m.hidden_size)

    def falcon(self, x: Buffer) -> Buffer:
        """Keys and values are picked by index; always with a mask, and without grouped heads."""
        m, tape = self.model, self.tape
        heads, kv_heads = m.num_attention_heads, m.num_key_value_heads
        fused = self.fused(x)
        q, k, v = self.sliced(fused)
        k, v = self.picked(k), self.picked(v)
        if kv_heads > 1:  # new_decoder_architecture: every head gets its own
            q = self.copy("flatten", q)
            k = tape.op("flatten", [k], k.bytes // kv_heads * heads, k.size)
            v = tape.op("flatten", [v], v.bytes // kv_heads * heads, v.size)
            kv_heads = heads
        q, k = self.rope(q, k)
        dim, kernel = m.head_dim, self.setting.kernel
        if kernel == "eager":
            k, v = self.cached(k, v)
            out = self.falcon_eager(q, k, v, heads, heads // kv_heads)
        elif kv_heads != heads:  # kernels want as many heads of keys
            k, v = self.cached(k, v)
            c = self.product_size(q)
            cast = self.cast(q, c), self.cast(k, c), self.cast(v, c)
            out = self.math(*cast, heads, kv_heads, grouped=False)
        else:
            out = self.attend(q, k, v, heads, kv_heads, dim, dim, masked=True)
        return self.output(out, heads * dim)

    def falcon_eager(self, q: Buffer, k: Buffer, v: Buffer, heads: int, copies: int) -> Buffer:
        count = self.tokens * heads * (self.tokens // self.rows + self.past)
        scores = self.scores(q, k, count, copies)  # divided in place
        weights = self.softmax(self.masked(scores))
        del scores
        self.returned = weights
        return self.copy("reshape", self.weigh(weights, v, heads * self.model.head_dim, copies))

    def picked(self, x: Buffer) -> Buffer:
        """Rows by a list of indices: a copy."""
        return self.tape.op("index", [x], x.bytes, x.size)
