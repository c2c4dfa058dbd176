"""Autograd's bookkeeping on paper: what a piece of a model allocates, keeps and frees, in bytes.

A block is written as the model's own code is (blocks.py), with a Buffer for every tensor. A Buffer
lives as long as something refers to it, as in PyTorch: a local variable, a node that saved it for
backward, a gradient on its way. Nothing is computed; `Tape.peak` is the answer.

    tape = Tape(grad=True)
    x = tape.new(2 * tokens * hidden, 2, grad=True)
    y = tape.op("silu", [x], x.bytes, 2, saved=[x])
    kept = tape.live                    # what forward keeps for backward
    tape.backward(y.edge)               # tape.peak now covers backward too
"""

from __future__ import annotations

from collections.abc import Sequence

_BLOCK = 512  # the allocator rounds every request up to this (c10 kMinBlockSize)


class Edge:
    """A tensor's place in the autograd graph: the shape of its gradient, not its memory."""

    __slots__ = ("bytes", "size")

    def __init__(self, bytes: int, size: int) -> None:
        self.bytes, self.size = bytes, size


class Buffer:
    """One tensor: `bytes` in all, `size` per element; `edge` when a gradient flows to it.

    A view has no memory of its own (`own` is 0) and keeps its base alive.
    """

    __slots__ = ("base", "bytes", "edge", "name", "own", "size", "tape")

    def __init__(
        self,
        tape: Tape,
        bytes: int,
        size: int,
        edge: Edge | None,
        name: str,
        base: Buffer | None = None,
    ) -> None:
        self.tape, self.bytes, self.size, self.edge, self.name = tape, bytes, size, edge, name
        self.base = base
        self.own = own = 0 if base else -(-bytes // _BLOCK) * _BLOCK
        live = tape.live = tape.live + own
        if tape.names is not None:
            tape.names[id(self)] = (name, own)
        if live > tape.peak:
            tape.peak = live
            if tape.names is not None:
                tape.at_peak = list(tape.names.values())

    def __del__(self) -> None:
        tape = self.tape
        tape.live -= self.own
        if tape.names is not None:
            del tape.names[id(self)]


# One operation's backward: (outs, inputs, saved, temporary, shares, weight, name).
# outs: what it made, several where it split. saved keeps Buffers alive; temporary is bytes needed
# while it runs; shares passes the incoming gradient on without a copy (SAME: to inputs like it, as
# add does; PARTS: a view of it to each, as cat does); weight is the bytes of the weight gradient
# that it makes.
Node = tuple[tuple[Edge, ...], list[Edge], Sequence[Buffer], int, int, int, str]
SAME, PARTS = 1, 2


class Tape:
    """Records a forward pass in bytes; `backward` plays it back; explain names what is alive."""

    __slots__ = (
        "accumulate",
        "at_peak",
        "grad",
        "grads",
        "live",
        "names",
        "nodes",
        "peak",
        "region",
    )

    def __init__(self, grad: bool, accumulate: bool = False, explain: bool = False) -> None:
        self.live = self.peak = 0
        self.grad = grad
        self.accumulate = accumulate  # gradients exist: new ones are added to them, then freed
        self.nodes: list[Node] = []
        self.grads: list[Buffer] = []  # weight gradients made by backward
        self.region: list[Buffer] = []  # autocast's cached casts of weights, until its region ends
        self.names: dict[int, tuple[str, int]] | None = {} if explain else None
        self.at_peak: list[tuple[str, int]] = []

    def new(self, bytes: int, size: int, grad: bool = False, name: str = "") -> Buffer:
        """A tensor that comes from outside: an input, a mask."""
        return Buffer(self, bytes, size, Edge(bytes, size) if grad and self.grad else None, name)

    def op(
        self,
        name: str,
        inputs: Sequence[Buffer],
        bytes: int,
        size: int,
        saved: Sequence[Buffer] = (),
        during: int = 0,
        temporary: int = 0,
        shares: int = 0,
        weight: int = 0,
    ) -> Buffer:
        """One operation's output; during: bytes it needs while it runs; the rest as in Node."""
        edges = [i.edge for i in inputs if i.edge is not None] if self.grad else []
        if not edges and not (weight and self.grad):
            out = Buffer(self, bytes, size, None, name)
        else:
            edge = Edge(bytes, size)
            out = Buffer(self, bytes, size, edge, name)
            self.nodes.append(((edge,), edges, saved, temporary, shares, weight, name))
        if during:
            Buffer(self, during, 1, None, name)
        return out

    def view(self, x: Buffer, bytes: int) -> Buffer:
        """Part of x, without memory of its own; its gradient is scattered into one of x's shape."""
        edge = Edge(bytes, x.size) if x.edge is not None else None
        if edge is not None and x.edge is not None:
            self.nodes.append(((edge,), [x.edge], (), 0, 0, 0, "slice"))
        return Buffer(self, bytes, x.size, edge, x.name, base=x)

    def expand(self, x: Buffer, times: int) -> Buffer:
        """x seen `times` as large, without memory of its own; its gradient is summed."""
        edge = Edge(times * x.bytes, x.size) if x.edge is not None else None
        if edge is not None and x.edge is not None:
            self.nodes.append(((edge,), [x.edge], (), 0, 0, 0, "expand"))
        return Buffer(self, times * x.bytes, x.size, edge, x.name, base=x)

    def add_into(self, x: Buffer, y: Buffer) -> Buffer:
        """x += y: x's own memory, and the gradient goes to both."""
        edges = [b.edge for b in (x, y) if b.edge is not None]
        edge = Edge(x.bytes, x.size) if edges else None
        if edge is not None:
            self.nodes.append(((edge,), edges, (), 0, SAME, 0, "add_"))
        return Buffer(self, x.bytes, x.size, edge, x.name, base=x)

    def split(self, x: Buffer, sizes: Sequence[int]) -> list[Buffer]:
        """All of x in parts, as split and chunk give them: backward joins their gradients."""
        if x.edge is None:
            return [Buffer(self, bytes, x.size, None, x.name, base=x) for bytes in sizes]
        edges = tuple(Edge(bytes, x.size) for bytes in sizes)
        self.nodes.append((edges, [x.edge], (), 0, 0, 0, "split"))
        return [Buffer(self, edge.bytes, x.size, edge, x.name, base=x) for edge in edges]

    def backward(self, end: Edge | None) -> None:
        """Run the nodes backwards as the engine does: the latest first, with its gradient."""
        if end is None:
            return
        flowing = {end: Buffer(self, end.bytes, end.size, None, "gradient")}
        while self.nodes:
            outs, inputs, saved, temporary, shares, weight, name = self.nodes.pop()
            parts = [flowing.pop(edge) for edge in outs if edge in flowing]
            if not parts:
                continue
            gradient = parts[0]
            during = Buffer(self, temporary, 1, None, name) if temporary else None
            made = Buffer(self, weight, 1, None, "weight gradient") if weight else None
            for edge in inputs:
                same = (
                    shares
                    and edge.size == gradient.size
                    and (shares == PARTS or edge.bytes == gradient.bytes)
                )
                passed = gradient if same else Buffer(self, edge.bytes, edge.size, None, "gradient")
                flowing.setdefault(edge, passed)  # a second one is added in place, then freed
                del passed
            del gradient, parts, during, saved
            if made is not None:
                if not self.accumulate:
                    self.grads.append(made)
                made = None
