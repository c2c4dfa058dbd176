"""The operations that models are made of, on a Tape: what each keeps for its backward, and needs.

Every line states a fact of PyTorch's autograd (derivatives.yaml) or of the library whose operation
it is. `Setting` says under which regime; decoder.py and heads.py put the operations together.
"""

from __future__ import annotations

from dataclasses import dataclass

from fitcheck.kernels import Call, Card, attention_backward, up
from fitcheck.model import Model
from fitcheck.tape import Buffer, Tape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Setting:
    """How a layer is run; together with the Model and the shape it decides every byte.

    compute, weight, stream: bytes per element of products, of weights and of the residual stream
    (which has the weights' type, but for fp32 norms in a 16-bit base). trains: base
    weights get gradients; head_trains: the score head does. adapter: bytes per element of LoRA
    weights (0: none), on `targets`. stored: how linear weights are kept: plain, nf4, int8.
    kernel: flash, efficient, math, eager, cudnn. masked: an explicit mask (padded rows);
    masked_kernel is for layers whose window needs one anyway.
    """

    compute: int
    weight: int
    autocast: bool
    trains: bool
    kernel: str
    masked: bool
    stream: int
    masked_kernel: str = "efficient"
    head_trains: bool = False
    stored: str = "plain"
    adapter: int = 0
    rank: int = 0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: bool = False


ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Block:
    """Operations on a Tape under one Setting; `tokens` of `rows` sequences."""

    __slots__ = ("model", "past", "rows", "scored", "setting", "tape", "tokens")

    def __init__(
        self,
        tape: Tape,
        model: Model,
        setting: Setting,
        rows: int,
        length: int,
        scored: int = 0,
        past: int = 0,
    ) -> None:
        self.tape, self.model, self.setting = tape, model, setting
        self.rows, self.tokens, self.scored, self.past = rows, rows * length, scored, past

    def cast(self, x: Buffer, size: int) -> Buffer:
        return x if x.size == size else self.tape.op("cast", [x], x.bytes // x.size * size, size)

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        size = max(x.size, y.size)
        return self.tape.op("add", [x, y], max(x.bytes // x.size, y.bytes // y.size) * size, size, shares=True)

    def scale(self, x: Buffer) -> Buffer:
        """x times a number: a new tensor that keeps nothing."""
        return self.tape.op("scale", [x], x.bytes, x.size)

    def keeping_input(self, name: str, x: Buffer) -> Buffer:
        """An activation whose backward reads its input (silu, gelu)."""
        return self.tape.op(name, [x], x.bytes, x.size, saved=[x])

    def keeping_output(self, name: str, x: Buffer) -> Buffer:
        """One whose backward reads its output (tanh, relu, softmax)."""
        keep: list[Buffer] = []
        out = self.tape.op(name, [x], x.bytes, x.size, saved=keep)
        if out.edge is not None:
            keep.append(out)
        return out

    def mul(self, x: Buffer, y: Buffer) -> Buffer:
        size = max(x.size, y.size)
        keep = [b for b, other in ((x, y), (y, x)) if other.edge is not None]
        return self.tape.op("mul", [x, y], x.bytes // x.size * size, size, saved=keep)

    def rms_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """LlamaRMSNorm on `count` vectors of `width`: fp32 inside, the weight's product outside."""
        tape, n, kind = self.tape, count * width, x.size
        wide = self.cast(x, 4)
        squares = tape.op("norm.pow", [wide], 4 * n, 4, saved=[wide], temporary=8 * n)
        mean = tape.op("norm.mean", [squares], 4 * count, 4)
        del squares
        root = tape.op("norm.rsqrt", [mean], 4 * count, 4)
        normed = tape.op("norm.mul", [wide, root], 4 * n, 4, saved=[wide, root], temporary=4 * n)
        del wide, mean, root
        narrow = self.cast(normed, kind)
        del normed
        trains = self.setting.trains
        size = max(kind, self.setting.stream)
        return tape.op(
            "norm.weight", [narrow], size * n, size,
            saved=[narrow] if trains else [], weight=width * self.setting.weight if trains else 0,
            temporary=size * n if trains else 0,
        )  # fmt: skip

    def layer_norm(self, x: Buffer, width: int, count: int) -> Buffer:
        """torch's own layer_norm: keeps its input and two fp32 figures a vector; fp32 under autocast."""
        s = self.setting
        size = 4 if s.autocast else x.size
        x = self.cast(x, size)
        stats = self.tape.new(8 * count, 4, name="norm statistics")
        return self.tape.op(
            "layer_norm", [x], count * width * size, size, saved=[x, stats],
            weight=2 * width * s.weight if s.trains else 0,
        )  # fmt: skip

    def norm(self, x: Buffer, width: int = 0, count: int = 0) -> Buffer:
        width = width or self.model.hidden_size
        kind = self.rms_norm if self.model.norm_type == "RMSNorm" else self.layer_norm
        return kind(x, width, count or self.tokens)

    def matmul(self, name: str, x: Buffer, inner: int, outer: int, count: int, weight: int, trains: bool,
               stored: str = "plain") -> Buffer:
        """x @ W for `count` rows: what is kept is the input if W trains, W's cast if x needs a gradient."""
        s, tape, n = self.setting, self.tape, inner * outer
        c = s.compute if s.autocast else (x.size if stored == "plain" else s.compute)
        x = self.cast(x, c)
        saved = [x] if trains and tape.grad else []
        if stored == "nf4":  # bitsandbytes unpacks the weight for each product, and again in backward
            return tape.op(name, [x], count * outer * c, c, during=n * c, temporary=n * c)
        if stored == "int8":  # 8-bit copy of the input, 32-bit sums (bitsandbytes LLM.int8)
            return tape.op(name, [x], count * outer * c, c, during=count * (inner + 4 * outer))
        kept = 0
        if weight != c:
            copy = Buffer(tape, n * c, c, None, name + " weight cast")
            if trains:
                tape.region.append(copy)  # autocast caches casts of weights that train
            if x.edge is not None:
                saved.append(copy)
            kept = n * c
        return tape.op(
            name, [x], count * outer * c, c, saved=saved,
            weight=n * weight if trains else 0, cast=kept if trains else 0,
        )  # fmt: skip

    def linear(self, name: str, x: Buffer, inner: int, outer: int) -> Buffer:
        """A linear layer of the block, with its adapter when LoRA targets it (peft's Linear.forward)."""
        s = self.setting
        out = self.matmul(name, x, inner, outer, self.tokens, s.weight, s.trains, s.stored)
        if not s.adapter or not self.targeted(name):
            return out
        kind = out.size
        x = self.cast(x, s.adapter)
        if s.dropout:
            mask = self.tape.new(x.bytes // x.size, 1, name="dropout mask")
            x = self.tape.op("dropout", [x], x.bytes, x.size, saved=[mask])
            del mask
        down = self.matmul(name + ".lora_A", x, inner, s.rank, self.tokens, s.adapter, True)
        up = self.matmul(name + ".lora_B", down, s.rank, outer, self.tokens, s.adapter, True)
        del down
        scaled = self.scale(up)
        del up
        total = self.add(out, scaled)
        del out, scaled
        return self.cast(total, kind)

    def targeted(self, name: str) -> bool:
        targets = self.setting.targets
        if targets == "all-linear":
            return True
        return name in (ATTENTION_LINEARS if targets == "attention" else targets)

    def rope(self, x: Buffer, width: int) -> Buffer:
        """x cos + rotate_half(x) sin, in the wider of x's type and the stream's (that of cos, sin)."""
        tape, n = self.tape, self.tokens * width
        size = max(x.size, self.setting.stream)
        straight = tape.op("rope.cos", [x], n * size, size)
        half = tape.op("rope.half", [x], n * x.size, x.size, during=n * x.size // 2)
        turned = tape.op("rope.sin", [half], n * size, size)
        del half
        return self.add(straight, turned)

    def attention_core(
        self, q: Buffer, k: Buffer, v: Buffer, heads: int, kv_heads: int, dim: int
    ) -> Buffer:
        """The kernel: what it keeps, and its hidden workspace (memory.py names the sources)."""
        s, tape, rows = self.setting, self.tape, self.rows
        c = s.compute if s.autocast else q.size
        q, k, v = self.cast(q, c), self.cast(k, c), self.cast(v, c)
        length = self.tokens // rows
        reach = length + self.past
        out = self.tokens * heads * dim * c
        repeated = kv_heads != heads and (s.masked or dim > 256) and length > 1 or s.kernel == "eager"
        if repeated and kv_heads != heads:
            k = tape.op("repeat_kv", [k], rows * reach * heads * dim * c, c)
            v = tape.op("repeat_kv", [v], rows * reach * heads * dim * c, c)
        scores = rows * heads * length * reach
        if s.kernel in ("eager", "math"):
            return self._quadratic(q, k, v, scores, out, c)
        stats = Buffer(tape, 4 * rows * heads * up(length, 32 if s.kernel == "efficient" else 1), 4, None, "logsumexp")
        keep = [q, k, v, stats]
        if s.masked and s.kernel == "efficient":
            keep.append(tape.new(rows * length * up(reach, 8) * c, c, name="attention mask"))
        result = tape.op(
            "attention", [q, k, v], out, c, saved=keep,
            temporary=attention_backward(
                s.kernel,
                Call(rows, length, reach, heads, heads if repeated else kv_heads, dim, c),
                Card(),
            ),
        )  # fmt: skip
        if result.edge is not None:
            keep.append(result)  # the kernel's backward reads its own output
        return result

    def _quadratic(self, q: Buffer, k: Buffer, v: Buffer, scores: int, out: int, c: int) -> Buffer:
        """eager attention of transformers, and torch's math kernel: the scores are made whole."""
        tape, s = self.tape, self.setting
        if s.kernel == "math":  # computes in fp32 from upcast copies (aten _scaled_dot_product_attention_math)
            q, k, v = self.cast(q, 4), self.cast(k, 4), self.cast(v, 4)
            c = 4
        raw = tape.op("scores", [q, k], scores * c, c, saved=[q, k])
        scaled = self.scale(raw)
        del raw
        if s.masked:
            scaled = tape.op("scores.mask", [scaled], scaled.bytes, c, shares=True)
        wide = self.cast(scaled, 4)
        del scaled
        weights = self.keeping_output("softmax", wide)
        del wide
        narrow = self.cast(weights, c)
        del weights
        result = tape.op("attention", [narrow, v], out // s.compute * c, c, saved=[narrow, v])
        return self.cast(result, s.compute)
