"""One decoder layer of each kind, traced on meta: what it keeps and every height memory reaches.

    for kind in traced(model, RUNS["bf16 full none"], rows=2, length=512): ...

The layers are those of the dry run's own module (types, adapters, quantization); each is called as
the model calls it. coefficients.py turns heights at several lengths into polynomials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fitcheck.bench.adapters import add_adapter
from fitcheck.bench.attention import as_on_cuda, implementation
from fitcheck.bench.configs import empty_module
from fitcheck.bench.listed import TOWER
from fitcheck.bench.precision import DTYPES, MetaAutocast, keep_rotary_in_fp32
from fitcheck.bench.quantized import quantize
from fitcheck.bench.tracer import Tracer
from fitcheck.kernels import Card
from fitcheck.plan import Plan

META = torch.device("meta")
_OUTPUTS: dict[Any, Any] = {}  # what operators make, learnt once for all traces
CARD = Card((8, 0), 108)  # an A100; flash attention, whose cards agree on what a layer keeps
Heights = list[tuple[str, int]]  # (operator, bytes alive) at each allocation


@dataclass(slots=True)
class Traced:
    """Heights of one layer above what was alive before it, its input included."""

    hidden: int  # bytes of its input
    forward: Heights  # without gradients
    cached: int  # autocast's casts of weights that outlive it
    training: Heights = field(default_factory=list)
    kept: int = 0
    backward: Heights = field(default_factory=list)
    accumulate: Heights = field(default_factory=list)  # gradients exist: new ones are freed at once
    replay: Heights = field(default_factory=list)  # the layer's input outlives it
    replay_accumulate: Heights = field(default_factory=list)
    gradients: int = 0
    first: Traced | None = None  # where nothing below needs a gradient


class Kind(NamedTuple):
    """Layers that are alike: their places, and the tokens that one sees (0: all)."""

    places: tuple[int, ...]
    window: int
    label: str

    @property
    def place(self) -> int:
        """The one that is looked at: the first layer's input may have a type of its own."""
        return self.places[min(1, len(self.places) - 1)]


class Skipped(nn.Module):
    """In the place of a layer that is not looked at; `returned` is what the one before it gave."""

    returned: Any = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        plain = (bool, int, float, str, type(None))
        self.__dict__.update({k: v for k, v in vars(layer).items() if isinstance(v, plain)})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return Skipped.returned if isinstance(Skipped.returned, tuple) else hidden_states


def decoder_layers(module: Any) -> nn.ModuleList:
    """The decoder's layers."""
    count = module.config.get_text_config().num_hidden_layers
    found = [
        (path, child)
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == count and not TOWER.search(path)
    ]
    return min(found, key=lambda item: len(item[0]))[1]


def kinds(module: Any) -> tuple[Kind, ...]:
    """The kinds of layers, told apart by their parameters, types and plain attributes."""
    config = module.config.get_text_config()
    layers = decoder_layers(module)
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    places: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        names = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
        attributes = tuple(
            (name, key, value)
            for name, child in layer.named_modules()
            for key, value in vars(child).items()
            if isinstance(value, (bool, str)) and key != "training"
        )
        places.setdefault((types[i], names, attributes), []).append(i)
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    return tuple(
        Kind(tuple(found), getattr(config, windows.get(kind[0], ""), None) or 0, str(kind[0]))
        for kind, found in places.items()
    )


def prepared(plan: Plan, quant: str | None) -> tuple[Any, tuple[Kind, ...]]:
    """The plan's policy on meta, of each kind of layers one; the dry run's types and adapters."""
    dtype = plan.compute_dtype if quant else plan.weight_dtype
    attention = implementation(plan.attention)
    module = empty_module(plan.model, DTYPES[dtype], attention, headless=False)
    found, layers = kinds(module), decoder_layers(module)
    chosen = {0, *(kind.place for kind in found)}
    for i, layer in enumerate(layers):
        if i not in chosen:
            layers[i] = Skipped(layer)
    if quant:
        quantize(module, quant, DTYPES[dtype], META)
    keep_rotary_in_fp32(module)
    if plan.tuning in ("lora", "qlora"):
        add_adapter(plan, module, "policy")
    return module.train(), found


def traced(
    module: Any, plan: Plan, found: tuple[Kind, ...], rows: int, length: int, train: bool
) -> list[Traced]:
    """Each kind's layer on `rows` sequences of `length` tokens; train: backward too."""
    region: Callable[[], AbstractContextManager[Any]] = nullcontext
    if plan.autocast:
        region = lambda: MetaAutocast(DTYPES[plan.compute_dtype])  # noqa: E731
    tracer = Tracer(CARD)
    tracer.outputs = _OUTPUTS
    result = []
    with as_on_cuda(CARD.capability), tracer:
        tracer.handles |= {True, False}  # cuBLAS has its workspaces already
        calls = list(_calls(module, found, rows, length, plan.padding == "padded", region))
        for layer, call, like in calls:
            traced = _without_gradients(tracer, call, like, region)
            if train:
                _with_gradients(tracer, traced, layer, call, like, region, first=False)
                if plan.tuning != "full":
                    traced.first = Traced(like.nbytes, [], 0)
                    _with_gradients(tracer, traced.first, layer, call, like, region, first=True)
            result.append(traced)
    return result


def _calls(
    module: Any, found: tuple[Kind, ...], rows: int, length: int, padded: bool, region: Any
) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]]:
    """Each kind's layer, a call of it as the model calls it, and a tensor like its input."""
    layers = decoder_layers(module)
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for kind in found:

        def noted(*args: Any, i: int = kind.place, **kwargs: Any) -> Any:
            seen[i] = (args, kwargs)
            Skipped.returned = type(layers[i]).forward(layers[i], *args, **kwargs)
            return Skipped.returned

        layers[kind.place].forward = noted
    others = {
        i
        for i, layer in enumerate(layers)
        if not isinstance(layer, Skipped)
        and not any(i == kind.place or (i == 0 and 0 in kind.places) for kind in found)
    }
    for i in others:
        layers[i].forward = Skipped(layers[i]).forward
    ids = torch.zeros(rows, length, dtype=torch.long, device=META)
    options: dict[str, Any] = {"use_cache": False}
    if padded:
        options["attention_mask"] = torch.ones_like(ids)
        if "position_ids" in signature(module.forward).parameters:
            options["position_ids"] = torch.zeros_like(ids)
    with torch.no_grad(), region():
        module.base_model(ids, **options)
    Skipped.returned = None
    for i in others:
        del layers[i].forward
    for kind in found:
        layer = layers[kind.place]
        del layer.forward
        args, kwargs = seen[kind.place]
        like = args[0] if args else kwargs.pop("hidden_states")

        def call(x: Tensor, layer: Any = layer, rest: Any = args[1:], kw: Any = kwargs) -> Tensor:
            out = layer(x, *rest, **kw)
            return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

        yield layer, call, like


class Seed(torch.autograd.Function):
    """Where backward begins: makes the gradient of a layer's output, then lets it go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = (x.shape, x.dtype, x.device)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


def _without_gradients(tracer: Tracer, call: Any, like: Tensor, region: Any) -> Traced:
    with torch.no_grad():
        begin = len(tracer.events)
        with region():
            x = torch.empty_like(like)
            y = call(x)
            del x, y
            end = len(tracer.events)
    heights, live = _climb(tracer, begin, end)
    return Traced(like.nbytes, heights, live)


def _with_gradients(
    tracer: Tracer, into: Traced, layer: nn.Module, call: Any, like: Tensor, region: Any,
    first: bool,
) -> None:  # fmt: skip
    leaf = torch.empty_like(like).requires_grad_(not first)
    begin = len(tracer.events)
    with region():
        x = torch.empty_like(like) if first else leaf.clone()
        name = tracer.register(x, "input")
        y = call(x)
        if not y.requires_grad:  # nothing below trains, nor does anything in it
            into.training, _ = _climb(tracer, begin, len(tracer.events))
            into.backward = into.accumulate = [("nothing", 0)]
            into.replay = into.replay_accumulate = [("nothing", 0)]
            return
        edge = torch.autograd.graph.get_gradient_edge(Seed.apply(y))  # type: ignore[no-untyped-call]
        middle = len(tracer.events)
    del x, y
    end = len(tracer.events)
    into.training, _ = _climb(tracer, begin, middle)
    _, into.kept = _climb(tracer, begin, end)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    done: list[tuple[int, int]] = []  # (index into events, bytes of the gradient that is there)
    hooks = [
        p.register_post_accumulate_grad_hook(
            lambda p: done.append((len(tracer.events), p.grad.nbytes))
        )
        for p in parameters
    ]
    torch.autograd.backward([edge], [torch.empty((), device=META)])
    last = len(tracer.events)
    into.backward, _ = _climb(tracer, begin, last, end)
    into.gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    gone = next((i for i in range(begin, last) if tracer.events[i] == (0, name)), last)
    outlives = [(gone, like.nbytes)]
    added = [(i, -size) for i, size in done]
    into.accumulate, _ = _climb(tracer, begin, last, end, added)
    into.replay, _ = _climb(tracer, begin, last, end, outlives)
    into.replay_accumulate, _ = _climb(tracer, begin, last, end, [*added, *outlives])
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None


def _climb(
    tracer: Tracer, begin: int, end: int, since: int | None = None,
    changes: list[tuple[int, int]] | None = None,
) -> tuple[Heights, int]:  # fmt: skip
    """Heights at the allocations of events[begin:end] from `since` on, and what stays at the end.

    changes: (index, bytes) that are alive from that event on besides.
    """
    heights: Heights = []
    more = sorted(changes or [])
    live, sizes = 0, dict[int, int]()
    start = begin if since is None else since
    for i in range(begin, end):
        size, name = tracer.events[i]
        while more and more[0][0] <= i:
            live += more.pop(0)[1]
        if size > 0:
            sizes[name] = size
            live += size
            if i >= start:
                heights.append((str(tracer.made_by[name]), live))
        elif name in sizes:
            live -= sizes.pop(name)
    if since is not None and not heights:
        heights.append(("nothing", live))
    return heights, live
