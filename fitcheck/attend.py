"""The kernels that join queries, keys and values: what each keeps and hides, on a Tape."""

from __future__ import annotations

from fitcheck.kernels import Call, attention_backward, attention_forward, up
from fitcheck.rope import Rope
from fitcheck.tape import PARTS, SAME, Buffer


class Attend(Rope):
    """scaled_dot_product_attention as CUDA runs it, and the eager attention of transformers."""

    cache_widths = 2, 2  # bytes of one element of K, of V, as attention saw them last
    returned: Buffer | None = None  # attention weights: the layer's code holds them to its end
    cache: list[Buffer] | None = None  # keys and values, where a caller keeps them

    def attend(
        self, q: Buffer, k: Buffer, v: Buffer, heads: int, kv_heads: int, dim: int, out_dim: int,
        masked: bool = False,
    ) -> Buffer:  # fmt: skip
        """The kernel: what it keeps and hides; dim is that of queries and keys, out_dim v's."""
        s, tape, rows = self.setting, self.tape, self.rows
        if self.cache is not None:
            k, v = self.copy("cache", k), self.copy("cache", v)
            self.cache += (k, v)
        kernel = s.kernel
        k, v = self.cached(k, v)
        if kernel == "eager":
            return self.eager(q, k, v, heads, kv_heads, out_dim)
        length = self.tokens // rows
        reach = length + self.past
        masked = s.masked or (masked and length > 1)  # a window's cache holds no more than it sees
        if masked and kernel == "flash":
            kernel = s.masked_kernel
        if kv_heads != heads and (masked or dim > 256):  # use_gqa_in_sdpa of transformers
            k, v = self.repeat(k, heads, kv_heads), self.repeat(v, heads, kv_heads)
            kv_heads = heads
        if kernel in ("flash", "cudnn") and out_dim != dim:
            kernel = "efficient"  # flash attention has one head size
        if kernel == "efficient" and kv_heads != heads:
            kernel = "math"  # it does not know grouped heads
        c = s.compute if s.autocast else q.size
        cast_q, cast_k, cast_v = self.cast(q, c), self.cast(k, c), self.cast(v, c)
        if kernel == "math":
            return self.math(cast_q, cast_k, cast_v, heads, kv_heads)
        call = Call(rows, length, reach, heads, kv_heads, dim, out_dim, c)
        # Flash attention's output lies in memory as the queries do.
        turned = kernel == "flash" and self.flow.heads_first and length > 1
        bytes = self.tokens * heads * out_dim * c
        stats = tape.new(
            4 * rows * heads * up(length, 32 if kernel == "efficient" else 1), 4, name="logsumexp"
        )
        keep = [cast_q, cast_k, cast_v, stats]
        if masked and kernel == "efficient":
            keep.append(tape.new(rows * length * up(reach, 16) * c, c, name="attention mask"))
        result = tape.op(
            "attention", [cast_q, cast_k, cast_v], bytes, c, saved=keep,
            during=attention_forward(kernel, call, s.card),
            temporary=attention_backward(kernel, call, s.card) + turned * bytes if tape.grad else 0,
        )  # fmt: skip
        if result.edge is not None:
            keep.append(result)  # the kernel's backward reads its own output
        return self.copy("contiguous", result) if turned else result

    def cached(self, k: Buffer, v: Buffer) -> tuple[Buffer, Buffer]:
        """K and V of all tokens so far: those of the past lie in the KV cache."""
        self.cache_widths = k.size, v.size
        if not self.past:
            return k, v
        old = (self.tape.view(x, x.bytes // self.tokens * self.reach) for x in (k, v))
        return next(old), next(old)

    @property
    def reach(self) -> int:
        """The tokens that K and V are of, in all rows."""
        return self.tokens + self.rows * self.past

    def repeat(self, x: Buffer, heads: int, kv_heads: int) -> Buffer:
        """repeat_kv: K or V for every query head; of a single head it is a view."""
        if kv_heads == heads:
            return x
        if kv_heads == 1:
            return self.tape.expand(x, heads)
        return self.tape.op("repeat_kv", [x], x.bytes // kv_heads * heads, x.size)

    def eager(
        self, q: Buffer, k: Buffer, v: Buffer, heads: int, kv_heads: int, out_dim: int
    ) -> Buffer:
        """eager_attention_forward of transformers: the scores are made whole, with a mask added."""
        tape, rows = self.tape, self.rows
        kind = v.size if self.flow.stepwise or self.flow.sinks else q.size
        length = self.tokens // rows
        if self.flow.wide_scores:
            q, k = self.cast(q, 4), self.cast(k, 4)
        k, v = self.repeat(k, heads, kv_heads), self.repeat(v, heads, kv_heads)
        copies = 0 if 1 < kv_heads < heads else 1
        scores = self.scores(q, k, rows * heads * length * (length + self.past), copies)
        scores = self.scale(scores)
        if self.flow.softcap:
            scores = self.scale(scores)
            scores = self.keeping_output("tanh", scores)
            scores = self.scale(scores)
        scores = self.masked(scores)
        if self.flow.sinks:  # a learned logit a head takes part, then is dropped
            bytes = scores.bytes + rows * heads * length * scores.size
            wider = tape.op("sinks", [scores], bytes, scores.size, shares=PARTS)
            wider = tape.op("- max", [wider], bytes, scores.size, shares=SAME, temporary=bytes)
            weights = self.keeping_output("softmax", wider, temporary=bytes)
            scores = self.cast(tape.view(weights, scores.bytes), kind)
        elif self.flow.stepwise:
            scores = self.softmax(scores)
            scores = self.cast(scores, kind)
        else:
            scores = self.cast(self.softmax(scores), kind)
        self.returned = scores
        result = self.weigh(scores, v, heads * out_dim, copies)
        return self.copy("contiguous", result)

    def masked(self, scores: Buffer) -> Buffer:
        """scores + mask, which has the residual stream's type."""
        size = max(scores.size, self.setting.stream)
        return self.tape.op(
            "scores.mask", [scores], scores.bytes // scores.size * size, size, shares=SAME
        )

    def softmax(self, scores: Buffer) -> Buffer:
        """Attention weights, in fp32; its backward makes gradient x output first."""
        wide = (
            self.cast(scores, 4)
            if not self.flow.narrow_softmax or self.setting.autocast
            else scores
        )
        return self.keeping_output("softmax", wide, temporary=wide.bytes)

    def product_size(self, x: Buffer) -> int:
        """Bytes per element of a product with x: autocast has its own."""
        return self.setting.compute if self.setting.autocast else x.size

    def scores(self, q: Buffer, k: Buffer, count: int, copies: int, size: int = 0) -> Buffer:
        """q @ k.T of every head; torch.matmul copies heads that are not in one piece.

        copies: how often a head of k is then written, 0 where k lies in one piece.
        """
        c = size or self.product_size(q)
        q, k = self.cast(q, c), self.cast(k, c)
        if self.rows > 1 and not self.flow.heads_first:
            q = self.copy("matmul.copy", q)
            if copies:
                k = self.tape.op("matmul.copy", [k], copies * k.bytes, c, shares=SAME)
        return self.tape.op("scores", [q, k], count * c, c, saved=self.factors(q, k))

    def weigh(self, weights: Buffer, v: Buffer, width: int, copies: int, size: int = 0) -> Buffer:
        """weights @ v, as in `scores`; width: elements of one token's output."""
        c = size or self.product_size(v)
        weights, v = self.cast(weights, c), self.cast(v, c)
        if self.rows > 1 and copies:
            v = self.tape.op("matmul.copy", [v], copies * v.bytes, c, shares=SAME)
        return self.tape.op(
            "weighted values",
            [weights, v],
            self.tokens * width * c,
            c,
            saved=self.factors(weights, v),
        )

    def factors(self, a: Buffer, b: Buffer) -> list[Buffer]:
        """What a product of two tensors keeps: each for the other's gradient."""
        return [x for x, other in ((a, b), (b, a)) if other.edge is not None]

    def math(
        self, q: Buffer, k: Buffer, v: Buffer, heads: int, kv_heads: int, grouped: bool = True
    ) -> Buffer:
        """torch's own formula, in fp32 from upcast copies: _scaled_dot_product_attention_math."""
        tape, c = self.tape, q.size
        reach = self.tokens // self.rows + self.past
        q, k, v = self.cast(q, 4), self.cast(k, 4), self.cast(v, 4)
        mask = tape.new(4 * self.tokens // self.rows * reach, 4, name="attention mask")
        scaled_q = self.scale(q)
        copies = heads // kv_heads
        if grouped and copies > 1:  # enable_gqa
            k = tape.op("repeat_kv", [k], k.bytes * copies, 4)
            v = tape.op("repeat_kv", [v], v.bytes * copies, 4)
            copies = 1
        scaled = self.scale(k)
        # What a cache gives lies in one piece, but not a head that is seen as several.
        written = copies if copies > 1 or not self.past else 0
        scores = self.scores(scaled_q, scaled, self.tokens * heads * reach, written, 4)
        del scaled
        weights = self.keeping_output("softmax", scores, temporary=scores.bytes)
        Buffer(tape, scores.bytes // 4, 1, None, "rows that are masked")  # _safe_softmax
        del scores, mask
        width = v.bytes // 4 // self.reach * copies
        result = self.weigh(weights, v, width, 0 if grouped else written, 4)
        return self.cast(self.copy("contiguous", result), c)
