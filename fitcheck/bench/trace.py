"""The dry run's tracer: run a real training step on `meta` tensors and record every allocation.

    traced = trace(plan)                  # two whole steps: Adam's states appear in the first
    traced.events                         # (bytes, id) allocates, (0, id) frees, (-1, 0) empties

A storage is allocated when the first tensor on it appears, and freed when the last one is gone: the
same moments as on a card, since it is the same code under the same autograd engine.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fitcheck.bench import workspaces
from fitcheck.bench.attention import as_on_cuda
from fitcheck.plan import Plan

aten = torch.ops.aten
T = TypeVar("T")

DECODE_STEPS = 3  # traced; those after them are generated from the last two
MIB = 2**20
REPEATS = 2  # traced of a loop whose rounds are alike from the second on


class _Ref(weakref.ref):  # type: ignore[type-arg]
    """A reference to a storage that knows the storage's address and its id in the trace."""

    __slots__ = ("key", "id")
    key: int
    id: int


class Tracer(TorchDispatchMode):
    """Records allocations while active. detail: also the module and the stack of each (slow)."""

    def __init__(self, card: workspaces.Card, detail: bool = False) -> None:
        super().__init__()
        self.card = card
        self.detail = detail
        self.events: list[tuple[int, int]] = []
        self.marks: list[tuple[int, str]] = []
        self.made_by: list[Any] = [None]  # by id: the operator, or a name
        self.where: list[str] = [""]  # by id, with detail: the module
        self.live: dict[int, int] = {}  # address of a storage -> id
        self.refs: dict[int, _Ref] = {}
        self.rules: dict[Any, Any] = {}
        self.outputs: dict[Any, Any] = {}
        self.modules: list[str] = []
        self.handles: set[bool] = set()  # threads that have a cuBLAS handle: forward, backward
        self.twins: dict[int, list[int]] = {}  # generated allocations that live as long as this id
        events, live, refs, twins = self.events, self.live, self.refs, self.twins

        def freed(ref: _Ref) -> None:
            del live[ref.key]
            events.append((0, ref.id))
            del refs[ref.id]
            if ref.id in twins:
                events.extend((0, twin) for twin in twins.pop(ref.id))

        self.freed = freed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper against torch.compile would cost as much as the operator

    def register(self, tensor: Tensor, made_by: Any) -> int:
        """The id of the tensor's storage; a storage never seen before is an allocation."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self.live.get(key)
        if known is not None:
            return known
        size = storage.nbytes()
        if size == 0 or not tensor.is_meta:
            return 0
        name = self.allocate(size, made_by)
        ref = _Ref(storage, self.freed)
        ref.key, ref.id = key, name
        self.live[key] = name
        self.refs[name] = ref
        return name

    def allocate(self, size: int, made_by: Any) -> int:
        """Record an allocation that no tensor stands for; its id."""
        name = len(self.made_by)
        self.made_by.append(made_by)
        self.events.append((size, name))
        if self.detail:
            self.where.append(self.modules[-1] if self.modules else "")
        return name

    def free(self, name: int) -> None:
        """Record the end of what `allocate` made."""
        self.events.append((0, name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = self.rules.get(func)
        if rule is None:
            rule = self.rules[func] = _rule(func)
        return rule(self, func, args, kwargs or {})

    def made(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The outputs of an operator that makes new tensors, by its shapes if they were seen before.

        PyTorch's own meta kernels, many of them Python, take ten times longer.
        """
        key = (func, torch.get_default_dtype(), _shapes(args), _shapes(tuple(kwargs.items())))
        known = self.outputs.get(key)
        if known is None:
            out = func(*args, **kwargs)
            self.outputs[key] = _layouts(out) or _UNKNOWN
            return out
        if known is _UNKNOWN:
            return func(*args, **kwargs)
        single, layouts = known
        made = [
            layout and torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
            for layout in layouts
        ]
        return made[0] if single else tuple(made)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything within belongs to that phase."""
        self.marks.append((len(self.events), name))
        yield
        self.marks.append((len(self.events), "-"))

    def decode(self, steps: Iterable[T]) -> Iterator[T]:
        """The first steps of a decode loop; when they are over, the events of all the others."""
        steps = list(steps)
        bounds = [len(self.events)]
        for done, step in enumerate(steps, 1):
            yield step
            bounds.append(len(self.events))
            if done >= DECODE_STEPS and self._alike(*bounds[-3:]):
                self._extend(bounds[-3:], len(steps) - done)
                return

    def repeat(self, rounds: Iterable[T]) -> Iterator[T]:
        """The first rounds of a loop over micro-batches, minibatches or epochs."""
        yield from list(rounds)[:REPEATS]

    def _alike(self, first: int, second: int, end: int) -> bool:
        """Whether two rounds allocate and free in the same order."""
        events = self.events
        return [size > 0 for size, _ in events[first:second]] == [
            size > 0 for size, _ in events[second:end]
        ]

    def _extend(self, bounds: list[int], count: int) -> None:
        """Append `count` more rounds like the last one, whose sizes go on growing as they did.

        What the last round freed of itself or of the round before, each new one frees likewise.
        Tensors of the small pool that a round makes and frees are left out of all but the last.
        """
        first, second, end = bounds
        events, made_by, where = self.events, self.made_by, self.where
        before, last = events[first:second], events[second:end]
        places_before = {name: i for i, (size, name) in enumerate(before) if size > 0}
        places = {name: i for i, (size, name) in enumerate(last) if size > 0}
        ended = {name for size, name in last if size == 0}
        freed_later = {places_before[name] for name in ended if name in places_before}
        small = {
            name
            for (old, _), (size, name) in zip(before, last, strict=True)
            if name in ended and 0 < size + count * (size - old) <= MIB
        }
        previous = {i: name for name, i in places.items()}
        traced = dict(previous)
        kept: dict[int, list[int]] = {}  # by traced id: its twins, where no round frees it
        template = [
            (i, old, size, name)
            for i, ((old, _), (size, name)) in enumerate(zip(before, last, strict=True))
            if name not in small
        ]
        for n in range(1, count + 1):
            current: dict[int, int] = {}
            if n == count:  # the largest round, and the one that peaks
                template = [
                    (i, old, size, name)
                    for i, ((old, _), (size, name)) in enumerate(zip(before, last, strict=True))
                ]
            for i, old, size, name in template:
                if size > 0:
                    current[i] = len(made_by)
                    events.append((size + n * (size - old), current[i]))
                    made_by.append(made_by[name])
                    where.extend(where[name : name + 1])
                    if name not in ended and i not in freed_later:
                        kept.setdefault(name, []).append(current[i])
                elif name in places:
                    events.append((0, current[places[name]]))
                else:
                    events.append((0, previous[places_before[name]]))
            previous = current
        self.twins |= kept
        for i in freed_later:  # what lives on is the last round's, not the traced one's
            self._rename(traced[i], previous[i])

    def _rename(self, old: int, new: int) -> None:
        ref = self.refs.pop(old)
        self.refs[new] = ref
        self.live[ref.key] = ref.id = new


_UNKNOWN = (False, [])


def _shapes(values: Any) -> Any:
    """Everything about arguments that the shapes of outputs depend on."""
    parts: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            parts += (value.dtype, value.shape, value.stride(), value.is_meta)
        elif isinstance(value, (list, tuple)):
            parts.append(_shapes(value))
        else:
            parts += (type(value), value)
    return tuple(parts)


def _layouts(out: Any) -> Any:
    """(one tensor?, shape, stride and type of each); None unless all are whole new meta tensors."""
    single = isinstance(out, Tensor)
    layouts: list[Any] = []
    for tensor in (out,) if single else out:
        if tensor is None:
            layouts.append(None)
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_meta or type(tensor) is not Tensor:
            return None
        copy = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )
        if copy.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
        layouts.append((tensor.shape, tensor.stride(), tensor.dtype))
    return single, layouts


def _alias(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _in_place(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Nothing to compute on meta; the optimizer's step counters are real."""
    first = args[0]
    tensor = first[0] if isinstance(first, (list, tuple)) and first else first
    if isinstance(tensor, Tensor) and tensor.is_meta:
        return first if isinstance(first, Tensor) else None
    return func(*args, **kwargs)


def _plain(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    out = tracer.made(func, args, kwargs)
    if isinstance(out, Tensor):
        tracer.register(out, func)
    elif isinstance(out, (tuple, list)):
        for tensor in out:
            if isinstance(tensor, Tensor):
                tracer.register(tensor, func)
    return out


def _unsafe_view(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    return aten.view.default(*args)


def _rule(func: Any) -> Any:
    """How to record an operator: not at all (views, in-place), by its outputs, or specially."""
    special = _SPECIAL.get(func)
    if special is not None:
        return special
    workspace = workspaces.OF.get(func)
    if workspace is not None:
        return _with_workspace(workspace)
    schema = func._schema
    if func.namespace == "profiler":
        return _alias
    if not all(r.alias_info is not None for r in schema.returns):
        return _plain
    writes = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    name = schema.name.partition("::")[2]
    if len(writes) == 1 and writes[0] is not None and name.endswith("_"):
        if writes[0].name == "self" and torch.Tag.inplace_view not in func.tags:
            return _alias if name in ("set_", "resize_") else _in_place
    return _alias


def _with_workspace(workspace: Callable[..., Any]) -> Callable[..., Any]:
    def record(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        out = tracer.made(func, args, kwargs)
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in outputs[: workspaces.ON_CARD.get(func)]:
            if isinstance(tensor, Tensor):
                tracer.register(tensor, func)
        sizes = workspace(tracer.card, args, kwargs, out)
        names = [tracer.allocate(size, workspace.__name__) for size in sizes if size]
        for name in reversed(names):
            tracer.free(name)
        return out

    return record


def _matmul(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A matrix product; the first of each thread allocates cuBLAS's workspace, for good."""
    out = tracer.made(func, args, kwargs)
    tracer.register(out, func)
    backward = torch._C._current_graph_task_id() != -1
    if backward not in tracer.handles and out.is_meta:
        tracer.handles.add(backward)
        tracer.allocate(workspaces.cublas(tracer.card), "cublas")
    return out


def _add(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """An addition. Where two gradients meet, autograd adds in place if nobody else holds one of

    them (InputBuffer::accumulate), but not while a dispatch mode is active: done here instead.
    """
    if not kwargs and sys._getframe(2).f_code.co_name == "_engine_run_backward":
        if _unshared(args[0]):
            return args[0]
    out = tracer.made(func, args, kwargs)
    tracer.register(out, func)
    return out


# References to a tensor and its storage that the call itself holds, when nothing else does.
_CALL_TENSOR, _CALL_STORAGE = 4, 2


def _unshared(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return (
        tensor._use_count() == _CALL_TENSOR
        and torch._C._storage_Use_Count(storage._cdata) == _CALL_STORAGE
        and tensor.is_contiguous()
        and not torch.is_grad_enabled()
    )


def _scalar(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """The value of a meta tensor, asked for by transformers about its masks.

    Positions are those of one sequence a row; a mask that is given has padding in it.
    """
    if not args[0].is_meta:
        return func(*args, **kwargs)
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "find_packed_sequence_indices":
            return True
        frame = frame.f_back
    return False if args[0].dtype == torch.bool else 0


_SPECIAL: dict[Any, Any] = {
    aten.mm.default: _matmul,
    aten.addmm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.baddbmm.default: _matmul,
    aten.add.Tensor: _add,
    aten._unsafe_view.default: _unsafe_view,
    aten._local_scalar_dense.default: _scalar,
}


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest moment of a phase in one step: bytes in 512-byte blocks, and by whom they are held."""

    step: int
    phase: str
    bytes: int
    groups: dict[tuple[str, str, str], int]


@dataclass(slots=True)
class Trace:
    """Every allocation of a plan's steps, in order."""

    plan: Plan
    events: list[tuple[int, int]]
    marks: list[tuple[int, str]]  # (index into events, phase that begins there)
    made_by: list[Any]  # by id: the operator
    where: list[str]  # by id: the module, with detail
    owner: dict[int, tuple[str, str, str]]  # by id: (role, kind, what), of what outlives its phase
    step_starts: list[int] = field(default_factory=list)  # indices into events

    def peaks(self) -> list[Peak]:
        """The largest moment of each phase, step by step."""
        largest: dict[tuple[int, str], tuple[int, int]] = {}
        marks, starts = [*self.marks, (len(self.events), "-")], self.step_starts
        sizes: dict[int, int] = {}
        held, at, step, phase = 0, 0, 0, "-"
        for i, (size, name) in enumerate(self.events):
            while marks[at][0] <= i:
                phase = marks[at][1]
                at += 1
            while step + 1 < len(starts) and starts[step + 1] <= i:
                step += 1
            if size > 0:
                sizes[name] = size = -(-size // 512) * 512
                held += size
                if held > largest.get((step, phase), (0, 0))[0]:
                    largest[step, phase] = held, i
            elif size == 0:
                held -= sizes.pop(name)
        wanted = sorted((i, key) for key, (_, i) in largest.items())
        found = self._held_at([i for i, _ in wanted])
        return [
            Peak(step, phase, largest[step, phase][0], groups)
            for (_, (step, phase)), groups in zip(wanted, found, strict=True)
        ]

    def _held_at(self, indices: list[int]) -> list[dict[tuple[str, str, str], int]]:
        """Who holds how much just after each of these events (sorted)."""
        result: list[dict[tuple[str, str, str], int]] = []
        alive: dict[int, tuple[int, str]] = {}
        marks, at, phase, i = [*self.marks, (len(self.events), "-")], 0, "-", 0
        for index in indices:
            for i in range(i, index + 1):
                while marks[at][0] <= i:
                    phase = marks[at][1]
                    at += 1
                size, name = self.events[i]
                if size > 0:
                    alive[name] = (-(-size // 512) * 512, phase)
                elif size == 0:
                    del alive[name]
            i = index + 1
            groups: dict[tuple[str, str, str], int] = {}
            for name, (size, born) in alive.items():
                key = self.owner.get(name) or ("", born, self._what(name))
                groups[key] = groups.get(key, 0) + size
            result.append(groups)
        return result

    def _what(self, name: int) -> str:
        op = str(self.made_by[name])
        if len(self.where) > name and self.where[name]:
            return f"{op} in {self.where[name]}"
        return op


def trace(plan: Plan, steps: int = 2, detail: bool = False) -> Trace:
    """Trace whole steps of the plan, loading included."""
    from fitcheck.bench import roles as building
    from fitcheck.bench.steps import run_step

    capability = plan.gpu.compute_capability or (8, 0)
    tracer = Tracer(workspaces.Card(capability, plan.gpu.sm_count or 108), detail)
    result = Trace(plan, tracer.events, tracer.marks, tracer.made_by, tracer.where, {})
    recorder = _Labelling(tracer, result.owner)
    with ExitStack() as stack:
        stack.enter_context(as_on_cuda(capability))
        stack.enter_context(_no_garbage())
        stack.enter_context(tracer)
        with tracer.phase("load"):
            recorder.roles = building.build(plan, torch.device("meta"))
        recorder.weights()
        if detail:
            stack.enter_context(_modules(tracer, recorder.roles))
        for _ in range(steps):
            result.step_starts.append(len(tracer.events))
            run_step(plan, recorder.roles, recorder)
    return result


class _Labelling:
    """The recorder that a step sees; names what a phase leaves behind."""

    def __init__(self, tracer: Tracer, owner: dict[int, tuple[str, str, str]]) -> None:
        self.tracer, self.owner = tracer, owner
        self.roles: Any = None
        self.decode, self.repeat = tracer.decode, tracer.repeat

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.tracer.phase(name):
            yield
            if name.endswith("backward"):
                for role, module in self._modules():
                    self._label(role, "gradients", ((n, p.grad) for n, p in module.named_parameters()))
            if name.endswith("step"):
                self._states()

    def weights(self) -> None:
        for role, module in self._modules():
            self._label(role, "weights", module.named_parameters())
            self._label(role, "buffers", module.named_buffers())
        self._states()

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name in self.roles.__dataclass_fields__:
            value = getattr(self.roles, name)
            if isinstance(value, nn.Module):
                yield name, value

    def _states(self) -> None:
        for name in self.roles.__dataclass_fields__:
            role, value = name.partition("_")[0], getattr(self.roles, name)
            for optimizer in [value, getattr(value, "optimizer", None)]:
                if masters := getattr(optimizer, "masters", None):
                    self._label(role, "master weights", (("", p) for p in masters))
                inner = getattr(optimizer, "inner", optimizer)
                for state in getattr(inner, "state", {}).values():
                    self._label(role, "states", state.items())

    def _label(self, role: str, kind: str, tensors: Iterable[tuple[str, Any]]) -> None:
        for _, tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_meta:
                name = self.tracer.register(tensor, "unseen")
                if name:
                    self.owner.setdefault(name, (role, kind, ""))


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Python's cycle collector off: what it would free, and when, is no property of the step."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _modules(tracer: Tracer, roles: Any) -> Iterator[None]:
    """Keep `tracer.modules` the stack of the modules being run."""
    names: dict[int, str] = {}
    for field_name in roles.__dataclass_fields__:
        value = getattr(roles, field_name)
        if isinstance(value, nn.Module):
            for name, module in value.named_modules():
                names.setdefault(id(module), f"{field_name}.{name}")

    def enter(module: nn.Module, *_: Any) -> None:
        tracer.modules.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, *_: Any) -> None:
        tracer.modules.pop()

    first = nn.modules.module.register_module_forward_pre_hook(enter)
    second = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        first.remove()
        second.remove()
