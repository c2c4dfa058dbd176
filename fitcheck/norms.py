"""The norms of each architecture, written as its own code is, on a Tape."""

from __future__ import annotations

from fitcheck.kernels import reduction
from fitcheck.ops import Block
from fitcheck.tape import SAME, Buffer


class Norms(Block):
    """Norms of `count` vectors of `width`; the flow of an architecture names the one it uses."""

    def norm(self, x: Buffer, width: int = 0, count: int = 0) -> Buffer:
        kind = getattr(self, self.flow.norm)
        return kind(x, width or self.model.hidden_size, count or self.tokens)  # type: ignore[no-any-return]

    def rms_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """LlamaRMSNorm: fp32 inside, the weight's product outside."""
        normed = self.unit_rms(x, count)
        narrow = self.cast(normed, x.size)
        return self.weighted(narrow, max(x.size, self.setting.stream), width, count)

    def wide_rms_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """Olmo2RMSNorm: the weight's product in fp32 too."""
        normed = self.unit_rms(x, count)
        return self.cast(self.weighted(normed, 4, width, count), x.size)

    def gemma_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """GemmaRMSNorm: times 1 + weight, in fp32."""
        wide = self.cast(x, 4)
        normed = self.unit_rms(wide, count)
        del wide
        normed = self.weighted(normed, 4, width, count)
        return self.cast(normed, x.size)

    def unit_rms(self, x: Buffer, count: int) -> Buffer:
        """x / root mean square, in fp32."""
        tape = self.tape
        x = self.cast(x, 4)
        squares = self.keeping_input("norm.pow", x, temporary=2 * x.bytes)
        mean = tape.op("norm.mean", [squares], 4 * count, 4)
        del squares
        root = tape.op("norm.rsqrt", [mean], 4 * count, 4)
        return tape.op("norm.mul", [x, root], x.bytes, 4, saved=[x, root], temporary=x.bytes)

    def weighted(self, x: Buffer, size: int, width: int, count: int) -> Buffer:
        """x times the norm's weight, which is a vector; its gradient is a sum over all tokens."""
        s, bytes = self.setting, x.bytes // x.size * size
        if not s.trains:
            return self.tape.op("norm.weight", [x], bytes, size)
        return self.tape.op(
            "norm.weight", [x], bytes, size, saved=[x], weight=width * s.weight,
            temporary=bytes + (reduction(count, width, s.card) if self.tape.grad else 0),
        )  # fmt: skip

    def layer_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """torch's own layer_norm, in fp32 under autocast."""
        return self.native_norm(self.cast(x, 4) if self.setting.autocast else x, width, count)

    def nemotron_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """NemotronLayerNorm1P: in the compute type, autocast or not."""
        return self.native_norm(
            self.cast(x, self.setting.compute) if self.setting.autocast else x, width, count
        )

    def native_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """It keeps its input and two fp32 figures a vector."""
        s, size = self.setting, x.size
        stats = self.tape.new(8 * count, 4, name="norm statistics")
        return self.tape.op(
            "layer_norm", [x], count * width * size, size, saved=[x, stats],
            weight=2 * width * s.weight if s.trains else 0,
        )  # fmt: skip

    def bare_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """OlmoLayerNorm: without weights, in fp32."""
        wide = self.cast(x, 4)
        stats = self.tape.new(8 * count, 4, name="norm statistics")
        normed = self.tape.op("layer_norm", [wide], wide.bytes, 4, saved=[wide, stats])
        del wide
        return self.cast(normed, x.size)

    def cohere_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """CohereLayerNorm: a LayerNorm in Python, in fp32."""
        tape, kind = self.tape, x.size
        x = self.cast(x, 4)
        mean = tape.op("norm.mean", [x], 4 * count, 4)
        centred = tape.op("norm.centre", [x, mean], x.bytes, 4, shares=SAME)
        squares = self.keeping_input("norm.pow", centred, temporary=2 * x.bytes)
        del centred
        variance = tape.op("norm.mean", [squares], 4 * count, 4)
        del squares
        centred = tape.op("norm.centre", [x, mean], x.bytes, 4, shares=SAME)
        root = tape.op("norm.rsqrt", [variance], 4 * count, 4)
        normed = tape.op(
            "norm.mul", [centred, root], x.bytes, 4, saved=[centred, root], temporary=x.bytes
        )
        del centred, root, x
        normed = self.weighted(normed, 4, width, count)
        return self.cast(normed, kind)
