"""Rotary position embeddings (arXiv 2104.09864) of each architecture, on a Tape."""

from __future__ import annotations

from fitcheck.norms import Norms
from fitcheck.tape import Buffer

Pair = tuple[Buffer, Buffer]


class Rope(Norms):
    """Queries and keys, rotated; cos and sin have the residual stream's type."""

    def rope(self, q: Buffer, k: Buffer) -> tuple[Buffer, ...]:
        """Queries and keys, and what stays alive besides to the end of attention."""
        return getattr(self, self.flow.rope)(q, k) if self.flow.rope else (q, k)

    def halves(self, q: Buffer, k: Buffer) -> Pair:
        """The first half of a head against the second (llama)."""
        size = self.setting.stream
        return self.rotate(q, size), self.rotate(k, size)

    def wide(self, q: Buffer, k: Buffer) -> Pair:
        """With cos and sin in fp32, then back (olmo2)."""
        turned_q, turned_k = self.rotate(q, 4), self.rotate(k, 4)
        narrow = self.cast(turned_q, q.size)
        return narrow, self.cast(turned_k, k.size)

    def upcast(self, q: Buffer, k: Buffer) -> Pair:
        """Queries and keys in fp32, then back (cohere)."""
        kind = q.size
        q, k = self.cast(q, 4), self.cast(k, 4)
        turned_q, turned_k = self.rotate(q, 4), self.rotate(k, 4)
        narrow = self.cast(turned_q, kind)
        return narrow, self.cast(turned_k, kind)

    def upcast_parts(self, q: Buffer, k: Buffer) -> Pair:
        """Each product in fp32, then back; each layer makes its own cos and sin (ernie4_5)."""
        tables = self.tables(4)
        turned_q, turned_k = self.rotate_upcast(q, tables), self.rotate_upcast(k, tables)
        narrow = self.cast(turned_q, q.size)
        return narrow, self.cast(turned_k, k.size)

    def rotate_upcast(self, x: Buffer, tables: list[Buffer]) -> Buffer:
        tape, n = self.tape, x.bytes // x.size
        straight = tape.op("rope.cos", [self.cast(x, 4)], 4 * n, 4, saved=tables)
        turned = tape.op("rope.sin", [self.cast(self.half(x), 4)], 4 * n, 4, saved=tables)
        return self.add(straight, turned)

    def partial(self, q: Buffer, k: Buffer) -> Pair:
        """A part of each head, then joined with the rest (gpt_neox)."""
        return self.joined_parts(q, k, [])

    def partial_own(self, q: Buffer, k: Buffer) -> Pair:
        """The same, and each layer makes its own cos and sin (glm)."""
        return self.joined_parts(q, k, self.tables(self.setting.stream))

    def joined_parts(self, q: Buffer, k: Buffer, tables: list[Buffer]) -> Pair:
        size = self.setting.stream
        turned_q, rest_q = self.parts(q)
        turned_k, rest_k = self.parts(k)
        turned_q, turned_k = (
            self.rotate(turned_q, size, tables),
            self.rotate(turned_k, size, tables),
        )
        turned_q = self.cat([turned_q, rest_q])
        turned_k = self.cat([turned_k, rest_k])
        return turned_q, turned_k

    def partial_inline(self, q: Buffer, k: Buffer) -> tuple[Buffer, ...]:
        """As partial, within attention's own code, whose variables live to its end (phi)."""
        return self.joined_inline(q, k, [], [])

    def partial_repeated(self, q: Buffer, k: Buffer) -> tuple[Buffer, ...]:
        """The same, with cos and sin written out for queries and for keys (gptj)."""
        size = self.setting.stream
        return self.joined_inline(q, k, self.tables(size), self.tables(size))

    def joined_inline(
        self, q: Buffer, k: Buffer, q_tables: list[Buffer], k_tables: list[Buffer]
    ) -> tuple[Buffer, ...]:
        size = self.setting.stream
        turned_q, rest_q = self.parts(q)
        turned_k, rest_k = self.parts(k)
        turned_q = self.rotate(turned_q, size, q_tables)
        turned_k = self.rotate(turned_k, size, k_tables)
        joined = self.cat([turned_q, rest_q])
        return joined, self.cat([turned_k, rest_k]), turned_q, rest_q, turned_k, rest_k

    def joined(self, q: Buffer, k: Buffer) -> Pair:
        """As partial, though nothing is left to join: one after the other (phi3)."""
        size = self.setting.stream
        q_part, q_rest = self.parts(q)
        k_part, k_rest = self.parts(k)
        turned_q = self.cat([self.rotate(q_part, size), q_rest])
        return turned_q, self.cat([self.rotate(k_part, size), k_rest])

    def pairs(self, q: Buffer, k: Buffer) -> Pair:
        """Each half of the result by itself, then joined (deepseek_v3, gpt_oss)."""
        turned_q = self.rotate_pairs(q)
        return turned_q, self.rotate_pairs(k)

    def rotate_pairs(self, x: Buffer) -> Buffer:
        """(a cos - b sin) and (b cos + a sin) of the pairs (a, b)."""
        size, n = max(x.size, self.setting.stream), x.bytes // x.size // 2
        a, b = self.tape.split(x, [x.bytes // 2] * 2)
        times = self.tape.op
        first = self.add(
            times("rope.cos", [a], n * size, size), times("rope.sin", [b], n * size, size)
        )
        second = self.add(
            times("rope.cos", [b], n * size, size), times("rope.sin", [a], n * size, size)
        )
        return self.cat([first, second])

    def complex(self, q: Buffer, k: Buffer) -> Pair:
        """As complex numbers in fp32, then back (deepseek_v2)."""
        wide_q, wide_k = self.cast(q, 4), self.cast(k, 4)
        turned = self.cast(self.scale(wide_q), q.size)
        return turned, self.cast(self.scale(wide_k), k.size)

    def parts(self, x: Buffer) -> Pair:
        """The part of each head that is rotated, and the rest."""
        turned = int(self.model.head_dim * self.flow.rotary)
        bytes = x.bytes // self.model.head_dim * turned
        return self.tape.view(x, bytes), self.tape.view(x, x.bytes - bytes)

    def rotate(self, x: Buffer, size: int, tables: list[Buffer] | None = None) -> Buffer:
        """x cos + rotate_half(x) sin; size: bytes per element of cos and sin."""
        tape, n = self.tape, x.bytes // x.size
        size, kept = max(x.size, size), tables or []
        straight = tape.op("rope.cos", [x], n * size, size, saved=kept)
        turned = tape.op("rope.sin", [self.half(x)], n * size, size, saved=kept)
        return self.add(straight, turned)

    def half(self, x: Buffer) -> Buffer:
        """rotate_half: one half negated, then joined with the other."""
        return self.tape.op("rope.half", [x], x.bytes, x.size, during=x.bytes // 2)

    def tables(self, size: int) -> list[Buffer]:
        """cos and sin of one layer; a row each where the padding differs."""
        tokens = self.tokens if self.setting.masked else self.tokens // self.rows
        width = int(self.model.head_dim * self.flow.rotary)
        return [self.tape.new(2 * tokens * width * size, size, name="cos and sin")]
