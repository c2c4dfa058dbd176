"""Mixtures of experts: routers, stacked experts and shared ones, on a Tape.

The experts run as transformers' default does on CUDA, grouped_mm (integrations/moe.py): every token
is written once for each expert that it visits, whatever the router decides.
"""

from __future__ import annotations

from typing import Any

from fitcheck.model import MoE
from fitcheck.ops import Block
from fitcheck.tape import SAME, Buffer


class Mixture(Block):
    """What takes the MLP's place in a layer with experts; the flow names the router."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights: list[Buffer] = []  # experts with LoRA merged, until the block has run

    def mixture(self, x: Buffer) -> Buffer:
        """The routed experts, and the shared ones before or after them."""
        moe, flow = self.moe, self.flow
        shared = self.shared(x) if moe.shared_width and not flow.shared_last else None
        weights = getattr(self, flow.router)(x)
        out = self.experts(x, weights)
        if flow.shared_gate and shared is not None:
            gate = self.keeping_output("sigmoid", self.gate(x))
            shared = self.times_rows(shared, gate)
        if moe.shared_width and flow.shared_last:
            return self.add(out, self.shared(x))
        return out if shared is None else self.add(out, shared)

    @property
    def moe(self) -> MoE:
        assert self.model.moe is not None
        return self.model.moe

    def shared(self, x: Buffer) -> Buffer:
        """The shared experts: one gated MLP."""
        hidden, width, place = self.model.hidden_size, self.moe.shared_width, self.layout.mixture
        gate = self.linear(place, "gate_proj", x, hidden, width)
        active = self.keeping_input("act", gate)
        del gate
        up = self.linear(place, "up_proj", x, hidden, width)
        product = self.mul(active, up)
        del active, up
        return self.linear(place, "down_proj", product, width, hidden)

    def gate(self, x: Buffer) -> Buffer:
        """qwen2_moe: a number a token that scales the shared expert."""
        return self.linear(
            self.layout.mixture, self.layout.shared_expert_gate, x, self.model.hidden_size, 1
        )

    def times_rows(self, x: Buffer, rows: Buffer) -> Buffer:
        """x times a number a row; the numbers' gradient is a product of x's shape, summed."""
        size = max(x.size, rows.size)
        bytes = x.bytes // x.size * size
        keep = [b for b, other in ((x, rows), (rows, x)) if other.edge is not None]
        # Both gradients are made whole, in the wider type, before one is summed, the other cast.
        temporary = bytes * ((rows.edge is not None) + (x.edge is not None and x.size < size))
        return self.tape.op("times rows", [x, rows], bytes, size, saved=keep, temporary=temporary)

    def experts(self, x: Buffer, weights: Buffer) -> Buffer:
        """grouped_mm_experts_forward: tokens sorted by expert, two products, back in order."""
        moe, tape, hidden = self.moe, self.tape, self.model.hidden_size
        inner, visits = moe.moe_intermediate_size, self.tokens * moe.experts_per_token
        order, places = self.indices(visits), self.indices(visits)
        selected = tape.op("select", [x], visits * hidden * x.size, x.size, saved=[places])
        chosen = tape.op("select", [weights], visits * weights.size, weights.size, saved=[order])
        bias = self.expert_bias(visits * 2 * inner)
        out = self.grouped("gate_up_proj", selected, hidden, 2 * inner, bias)
        out = getattr(self, self.flow.expert_gate)(out)
        bias = self.expert_bias(visits * hidden)
        out = self.grouped("down_proj", out, inner, hidden, bias)
        weighted = self.times_rows(out, chosen)
        back = self.indices(visits)
        weighted = tape.op("reorder", [weighted], weighted.bytes, weighted.size, saved=[back])
        total = tape.op("sum", [weighted], self.tokens * hidden * weighted.size, weighted.size)
        self.weights.clear()
        return self.cast(total, x.size)

    def indices(self, count: int) -> Buffer:
        return self.tape.new(8 * count, 8, name="indices")

    def grouped(self, name: str, x: Buffer, inner: int, outer: int, bias: Buffer | None) -> Buffer:
        """A product a group of rows, in the type of the weights even under autocast."""
        s, count = self.setting, self.moe.num_experts
        x = self.cast(x, s.weight)
        bytes = x.bytes // inner * outer
        if self.adapts_experts:
            merged = self.merged(inner, outer, s.rank * (2 if name == "gate_up_proj" else 1))
            return self.tape.op(name, [x, merged], bytes, s.weight, saved=[x, merged])
        made = count * (inner + (bias is not None)) * outer * s.weight if s.trains else 0
        return self.tape.op(name, [x], bytes, s.weight, saved=[x] if s.trains else [], weight=made)

    @property
    def adapts_experts(self) -> bool:
        """Whether LoRA changes the stacked experts, which PEFT does to a copy of them."""
        s = self.setting
        return bool(s.adapter) and s.targets == "all-linear" and self.flow.adapted_experts

    def merged(self, inner: int, outer: int, rank: int) -> Buffer:
        """All experts with LoRA added (peft's ParamWrapper); kept for backward as a whole."""
        a, b = self.adapter_cast(inner, rank), self.adapter_cast(outer, rank)
        size = self.setting.weight
        bytes = self.moe.num_experts * inner * outer * size
        merged = self.tape.op("merged experts", [a, b], bytes, size, saved=[a, b])
        self.weights += [a, b, merged]
        return merged

    def adapter_cast(self, side: int, rank: int) -> Buffer:
        """One factor of LoRA for all experts, in the type of their weights."""
        s, elements = self.setting, rank * self.moe.num_experts * side
        made = elements * s.adapter
        return self.tape.op("expert adapter", [], elements * s.weight, s.weight, weight=made)

    def expert_bias(self, elements: int) -> Buffer | None:
        """gpt_oss: the bias of each visit's expert, gathered."""
        if not self.model.mlp_bias:
            return None
        return self.tape.new(
            elements * self.setting.weight, self.setting.weight, name="expert biases"
        )

    def swiglu(self, fused: Buffer) -> Buffer:
        gate, up = self.tape.split(fused, [fused.bytes // 2] * 2)
        return self.mul(self.keeping_input("act", gate), up)

    def clamped_swiglu(self, fused: Buffer) -> Buffer:
        """gpt_oss: (clamp(up) + 1) * gate sigmoid(a gate), of every other column."""
        gate, up = self.tape.view(fused, fused.bytes // 2), self.tape.view(fused, fused.bytes // 2)
        gate = self.keeping_input("clamp", gate)
        up = self.keeping_input("clamp", up)
        glu = self.mul(gate, self.keeping_output("sigmoid", self.scale(gate)))
        more = self.tape.op("+ 1", [up], up.bytes, up.size, shares=SAME)
        return self.mul(more, glu)

    def router_logits(self, x: Buffer, wide: bool = False, size: int = 0) -> Buffer:
        """A score for every expert; wide: in fp32, from copies of tokens and weights.

        size: bytes per element of the product, whatever autocast says.
        """
        m, s, tape, experts = self.model, self.setting, self.tape, self.moe.num_experts
        x = self.cast(x, 4) if wide else x
        name = self.layout.router.rpartition(".")[2]
        weight = 4 if name in self.flow.fp32 else s.weight
        if self.adapts_experts and not self.layout.router_is_linear:
            table = tape.op("router adapter", [], experts * m.hidden_size * weight, weight,
                            weight=s.rank * (experts + m.hidden_size) * s.adapter)  # fmt: skip
            x = self.cast(x, size or (s.compute if s.autocast else x.size))
            table = self.cast(table, x.size)
            return tape.op(
                name, [x, table], self.tokens * experts * x.size, x.size, saved=[x, table]
            )
        if self.layout.router_is_linear and s.adapter:
            return self.linear(self.layout.mixture, name, x, m.hidden_size, experts)
        return self.matmul(
            name,
            x,
            m.hidden_size,
            experts,
            self.tokens,
            weight,
            s.trains,
            cached=not wide or weight == 4,
            size=size,
        )

    def top(self, scores: Buffer) -> Buffer:
        """The best experts' scores; their indices are kept."""
        chosen = self.tokens * self.moe.experts_per_token
        size = scores.size
        return self.tape.op("topk", [scores], chosen * size, size, saved=[self.indices(chosen)])

    def softmax_router(self, x: Buffer) -> Buffer:
        """Softmax in fp32, the best of it, back in the logits' type (qwen3_moe)."""
        logits = self.router_logits(x)
        return self.cast(
            self.normalized(self.top(self.keeping_output("softmax", self.cast(logits, 4)))),
            logits.size,
        )

    def wide_softmax_router(self, x: Buffer) -> Buffer:
        """The same, left in fp32 (mixtral)."""
        logits = self.cast(self.router_logits(x), 4)
        return self.normalized(self.top(self.keeping_output("softmax", logits)))

    def sparsemixer(self, x: Buffer) -> Buffer:
        """Softmax, in fp32 under autocast alone (phimoe)."""
        logits = self.router_logits(x)
        wide = self.cast(logits, 4) if self.setting.autocast else logits
        return self.top(self.keeping_output("softmax", wide))

    def minimax_router(self, x: Buffer) -> Buffer:
        """Logits, then a sigmoid of each in fp32 (minimax_m2)."""
        logits = self.cast(self.router_logits(x), 4)
        return self.normalized(self.top(self.keeping_output("sigmoid", logits)))

    def ernie_router(self, x: Buffer) -> Buffer:
        """In fp32 throughout, autocast or not, then back (ernie4_5_moe)."""
        logits = self.router_logits(x, wide=True, size=4)
        return self.cast(self.normalized(self.top(self.keeping_output("softmax", logits))), x.size)

    def hunyuan_router(self, x: Buffer) -> Buffer:
        """Its weights are fp32 in any type of model (hunyuan_v1_moe)."""
        m, s, experts = self.model, self.setting, self.moe.num_experts
        logits = self.matmul(
            "wg", self.cast(x, 4), m.hidden_size, experts, self.tokens, 4, s.trains
        )
        weights = self.normalized(self.top(self.keeping_output("softmax", self.cast(logits, 4))))
        return self.cast(weights, logits.size)

    def hy_router(self, x: Buffer) -> Buffer:
        """As sigmoid_router, but for a division that ends in fp32 (hy_v3)."""
        logits = self.router_logits(x, wide=True)
        weights = self.top(self.keeping_output("sigmoid", logits))
        return self.scale(self.normalized(self.cast(weights, 4)))

    def normalized(self, weights: Buffer) -> Buffer:
        """Divided by their sum."""
        return self.keeping_input("normalize", weights)

    def granite_router(self, x: Buffer) -> Buffer:
        """The best logits first, then softmax, in fp32 and back (granitemoe)."""
        logits = self.cast(self.router_logits(x), 4)
        return self.cast(self.keeping_output("softmax", self.top(logits)), x.size)

    def deepseek_router(self, x: Buffer) -> Buffer:
        """Logits in fp32, then softmax (deepseek_v2)."""
        logits = self.router_logits(x, wide=True)
        return self.scale(self.top(self.keeping_output("softmax", self.cast(logits, 4))))

    def sigmoid_router(self, x: Buffer) -> Buffer:
        """Logits in fp32, each a sigmoid of its own (deepseek_v3)."""
        logits = self.router_logits(x, wide=True)
        return self.scale(self.normalized(self.top(self.keeping_output("sigmoid", logits))))

    def top_softmax_router(self, x: Buffer) -> Buffer:
        """The best logits first, then softmax (gpt_oss)."""
        return self.keeping_output("softmax", self.top(self.router_logits(x)))
