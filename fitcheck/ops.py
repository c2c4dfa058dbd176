"""The operations that models are made of, on a Tape: what each keeps for its backward, and needs.

Every line states a fact of PyTorch's autograd (derivatives.yaml) or of the library whose operation
it is. `Setting` says under which regime; norms.py, attention.py, mixture.py and decoder.py put the
operations together as models do.
"""

from __future__ import annotations

from typing import NamedTuple

from fitcheck.flows import EXPERT_LINEARS, FLOWS, HEADS, Flow
from fitcheck.kernels import Card, reduction
from fitcheck.layouts import LAYOUTS, LLAMA, Layout
from fitcheck.model import Model
from fitcheck.tape import PARTS, SAME, Buffer, Tape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# bitsandbytes 0.50 multiplies fewer tokens with a 4-bit weight as it is (gemm_4bit in
# backends/cuda/ops.py: by card and shape between 4 and 512; 16 holds for most).
FUSED_TOKENS = 16


class Setting(NamedTuple):
    """How a layer is run; together with the Model and the shape it decides every byte.

    compute, weight, stream: bytes per element of products, of weights and of the residual stream
    (which has the weights' type, but for fp32 norms in a 16-bit base). trains: base
    weights get gradients; head_trains: the score head does. adapter: bytes per element of LoRA
    weights (0: none), on `targets`. stored: how linear weights are kept: plain, nf4, int8.
    kernel: flash, efficient, math, eager, cudnn. masked: an explicit mask (padded rows);
    masked_kernel is for layers whose window needs one anyway. kernel_head: the fused head is one
    kernel (TRL's).
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
    kernel_head: bool = False
    card: Card = Card()


class Block:
    """Operations on a Tape under one Setting; `tokens` of `rows` sequences."""

    __slots__ = ("flow", "layout", "model", "past", "rows", "scored", "setting", "tape", "tokens")

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
        self.layout: Layout = LAYOUTS.get(model.model_type, LLAMA)
        self.flow: Flow = FLOWS.get(model.model_type) or HEADS.get(model.model_type, Flow())

    def cast(self, x: Buffer, size: int) -> Buffer:
        return x if x.size == size else self.tape.op("cast", [x], x.bytes // x.size * size, size)

    def copy(self, name: str, x: Buffer) -> Buffer:
        """The same values in another layout (contiguous, reshape): keeps nothing."""
        return self.tape.op(name, [x], x.bytes, x.size, shares=SAME)

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        size = max(x.size, y.size)
        bytes = max(x.bytes // x.size, y.bytes // y.size) * size
        return self.tape.op("add", [x, y], bytes, size, shares=SAME)

    def scale(self, x: Buffer) -> Buffer:
        """x times a number: a new tensor that keeps nothing."""
        return self.tape.op("scale", [x], x.bytes, x.size)

    def keeping_input(self, name: str, x: Buffer, temporary: int = 0) -> Buffer:
        """An operation whose backward reads its input (silu, gelu, pow)."""
        return self.tape.op(name, [x], x.bytes, x.size, saved=[x], temporary=temporary)

    def keeping_output(self, name: str, x: Buffer, temporary: int = 0) -> Buffer:
        """One whose backward reads its output (tanh, relu, softmax)."""
        keep: list[Buffer] = []
        out = self.tape.op(name, [x], x.bytes, x.size, saved=keep, temporary=temporary)
        if out.edge is not None:
            keep.append(out)
        return out

    def mul(self, x: Buffer, y: Buffer) -> Buffer:
        """x * y: each keeps the other. Of two types, a gradient is made in the wider one first."""
        size = max(x.size, y.size)
        bytes = x.bytes // x.size * size
        keep = [b for b, other in ((x, y), (y, x)) if other.edge is not None]
        mixed = x.size != y.size and x.edge is not None and y.edge is not None
        return self.tape.op("mul", [x, y], bytes, size, saved=keep, temporary=bytes if mixed else 0)

    def cat(self, parts: list[Buffer]) -> Buffer:
        """Parts joined into a new tensor, in the widest of their types."""
        size = max(part.size for part in parts)
        bytes = sum(part.bytes // part.size for part in parts) * size
        return self.tape.op("cat", parts, bytes, size, shares=PARTS)

    def activation(self, x: Buffer) -> Buffer:
        """The MLP's activation function, by its name in transformers' ACT2FN."""
        name = self.model.activation or self.flow.activation
        if name == "relu":
            return self.keeping_output(name, x)
        if name == "relu2":
            return self.square(self.keeping_output("relu", x))
        if name in ("gelu_new", "xielu", "bloom_gelu"):
            return getattr(self, name)(x)  # type: ignore[no-any-return]
        return self.keeping_input(name, x)

    def square(self, x: Buffer) -> Buffer:
        """torch.pow, in fp32 under autocast; its backward makes 2x, then the gradient."""
        wide = self.cast(x, 4) if self.setting.autocast else x
        return self.keeping_input("pow", wide, temporary=2 * wide.bytes)

    def gelu_new(self, x: Buffer) -> Buffer:
        """NewGELUActivation, a formula in Python: x/2 (1 + tanh(a (x + b x^3)))."""
        half = self.scale(x)
        inner = self.scale(self.square(x))
        inner = self.add(x, inner)
        inner = self.scale(inner)
        inner = self.keeping_output("tanh", inner)
        inner = self.tape.op("1 +", [inner], inner.bytes, inner.size, shares=SAME)
        return self.mul(half, inner)

    def bloom_gelu(self, x: Buffer) -> Buffer:
        """GeLUFunction: an autograd function of its own, whose formula runs in Python both ways."""
        steps = {"during": 3 * x.bytes, "temporary": 4 * x.bytes}
        return self.tape.op("gelu", [x], x.bytes, x.size, saved=[x], **steps)

    def xielu(self, x: Buffer) -> Buffer:
        """XIELUActivation, a formula: a x x + b x, or (expm1(min(x, e)) - x) c + b x below 0."""
        s, tape, n = self.setting, self.tape, x.bytes // x.size
        positive = tape.new(n, 1, name="sign")
        out = self.slope(x)
        out = self.mul(out, x)
        out = self.add(out, self.scale(x))
        least = self.keeping_input("minimum", x)
        least = self.cast(least, 4) if s.autocast else least
        other = self.keeping_output("expm1", least, temporary=least.bytes)
        del least
        other = self.add(other, x)
        other = self.slope(other)
        other = self.add(other, self.scale(x))
        return tape.op(
            "where",
            [out, other],
            max(out.bytes, other.bytes),
            max(out.size, other.size),
            saved=[positive],
        )

    def slope(self, x: Buffer) -> Buffer:
        """x times a learned number."""
        s, n = self.setting, x.bytes // x.size
        size = (
            4 if s.autocast else max(x.size, s.weight)
        )  # softplus makes it, in fp32 under autocast
        keep, made = ([x], s.weight) if s.trains else ([], 0)
        temporary = (
            n * size * (s.trains + (size > x.size))
        )  # both gradients are made in the wider type
        return self.tape.op(
            "slope", [x], n * size, size, saved=keep, weight=made, temporary=temporary
        )

    def matmul(
        self,
        name: str,
        x: Buffer,
        inner: int,
        outer: int,
        count: int,
        weight: int,
        trains: bool,
        stored: str = "plain",
        bias: bool = False,
        cached: bool = True,
        size: int = 0,
    ) -> Buffer:
        """x @ W for `count` rows: keeps the input if W trains, W's cast if x needs a gradient."""
        s, tape, n = self.setting, self.tape, inner * outer
        c = size or (s.compute if s.autocast or stored != "plain" else x.size)
        if stored == "nf4":  # bitsandbytes unpacks the weight for each product, forward and back
            given, x = x.size, self.cast(x, c)
            maxima = 4 * -(-n // 64)  # of its blocks, dequantized; forward adds their mean anew
            during = n * c + 2 * maxima if count >= FUSED_TOKENS else 0
            out = tape.op(name, [x], count * outer * c, c, during=during, temporary=n * c)
            return self.cast(out, given)  # Linear4bit.forward: back to the input's type
        if stored == "int8":  # 8-bit input, 32-bit sums, those in fp16 (bitsandbytes LLM.int8)
            x = self.cast(x, c)
            return tape.op(name, [x], count * outer * c, c, during=count * (inner + 6 * outer))
        made = (n + outer * bias) * weight if trains else 0
        inputs, saved = [x], []
        if weight != c:  # autocast casts the weight first, and keeps the cast of one that trains
            copy = tape.op(name + " weight cast", [], n * c, c, weight=made)
            if trains and cached:
                tape.region.append(copy)
            if x.edge is not None:
                saved.append(copy)
            inputs.append(copy)
            made = 0
        inputs[0] = x = self.cast(x, c)
        if trains:
            saved.append(x)
        sums = reduction(count, outer, s.card) if bias and trains and tape.grad else 0
        return tape.op(name, inputs, count * outer * c, c, saved=saved, weight=made, temporary=sums)

    def linear(
        self, place: str, name: str, x: Buffer, inner: int, outer: int, bias: bool = False
    ) -> Buffer:
        """A linear layer, with its adapter when LoRA targets it (peft's Linear.forward)."""
        s = self.setting
        out = self.matmul(
            name, x, inner, outer, self.tokens, s.weight, s.trains, s.stored, bias,
            cached=not self.flow.own_linear,
        )  # fmt: skip
        if not s.adapter or not self.targeted(place, name):
            return out
        kind, four_bit = out.size, s.stored == "nf4"
        if four_bit:  # peft's Linear4bit copies the result, and casts nothing under autocast
            out = self.copy("clone", out)
        if not (four_bit and s.autocast):
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
        if four_bit:
            scaled = self.cast(scaled, kind)
        total = self.add(out, scaled)
        del out, scaled
        return self.cast(total, kind)

    def targeted(self, place: str, name: str) -> bool:
        """Whether LoRA adapts the linear layer `name` of the block's part `place`."""
        targets = self.setting.targets
        if targets == "all-linear":  # PEFT takes the MLP's names for those of the experts
            return not (self.flow.adapted_experts and name in EXPERT_LINEARS)
        return place == self.layout.attention if targets == "attention" else name in targets
