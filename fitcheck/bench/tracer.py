"""Record every allocation that PyTorch code makes on `meta` tensors, as the CUDA build would.

    tracer = Tracer(Card())
    with tracer:
        loss = model(ids).logits.float().mean()
        loss.backward()
    tracer.events  # (bytes, id) allocates, (0, id) frees, (-1, 0) empties the cache

A storage is allocated when the first tensor on it appears, and freed when the last one is gone: the
same moments as on a card, since it is the same code under the same autograd engine. Where that
engine does otherwise because somebody watches, or because the tensors are on `meta`, the operators
at the end of this file set it right.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fitcheck.bench import workspaces
from fitcheck.kernels import Card

aten = torch.ops.aten


class _Ref(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage that knows the storage's address and its id in the trace."""

    __slots__ = ("key", "id")
    key: int
    id: int


class Tracer(TorchDispatchMode):
    """Records while active. Who keeps `modules` learns the module of each allocation, too."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.events: list[tuple[int, int]] = []
        self.made_by: list[Any] = [None]  # by id: the operator, or a name
        self.where: list[str] = [""]  # by id: the module
        self.modules: list[str] = [""]  # the stack of running modules
        self.twins: dict[int, list[int]] = {}  # generated allocations that end with this id
        self.live: dict[int, int] = {}  # address of a storage -> id
        self.refs: dict[int, _Ref] = {}
        self.rules: dict[Any, Any] = {}  # operator -> how it is recorded
        self.outputs: dict[Any, Any] = {}  # operator and shapes -> what it makes
        self.nobody_else = _nobody_else() if type(self) is Tracer else (0, 0)
        self.handles: set[bool] = set()  # of cuBLAS: in the forward thread, in autograd's
        events, live, refs, twins = self.events, self.live, self.refs, self.twins

        def freed(ref: _Ref) -> None:
            del live[ref.key], refs[ref.id]
            events.append((0, ref.id))
            if ref.id in twins:
                events.extend((0, twin) for twin in twins.pop(ref.id))

        self.freed = freed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard against torch.compile would cost as much as the operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = self.rules.get(func)
        if rule is None:
            rule = self.rules[func] = _rule(func)
        return rule(self, func, args, kwargs or {})

    def register(self, tensor: Tensor, made_by: Any) -> int:
        """The id of a tensor's storage; one never seen before is an allocation. 0: takes nothing."""
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
        self.where.append(self.modules[-1])
        self.events.append((size, name))
        return name

    def rename(self, old: int, new: int) -> None:
        """The storage known as `old` is `new` from here on."""
        ref = self.refs[new] = self.refs.pop(old)
        self.live[ref.key] = ref.id = new

    def made(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """What an operator makes: from memory, if it was called with these shapes before.

        PyTorch's own meta kernels, many of them in Python, take ten times as long.
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
        tensors = [
            torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
            if type(layout) is tuple
            else layout
            for layout in layouts
        ]
        return tensors[0] if single else tuple(tensors)


_UNKNOWN = (False, ())


def _shapes(values: Any) -> tuple[Any, ...]:
    """All of some arguments that the shapes of outputs depend on."""
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
    """(a single tensor?, shape, strides and type of each); None unless all are new meta tensors.

    An integer among the outputs follows from the shapes.
    """
    single = isinstance(out, Tensor)
    layouts: list[Any] = []
    for tensor in (out,) if single else out:
        if tensor is None or isinstance(tensor, int):
            layouts.append(tensor)
        elif isinstance(tensor, Tensor) and tensor.is_meta:
            layout = (tensor.shape, tensor.stride(), tensor.dtype)
            copy = torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
            if copy.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
                return None
            layouts.append(layout)
        else:
            return None
    return single, layouts


def _rule(func: Any) -> Any:
    """How to record an operator: by its outputs, not at all (views, in-place), or specially."""
    if func in _SPECIAL:
        return _SPECIAL[func]
    if func in workspaces.OF:
        return _with_workspace
    schema = func._schema
    if func.namespace == "profiler" or not schema.returns:
        return _in_place if schema.name.startswith("aten::_foreach") else _alias
    if any(r.alias_info is None for r in schema.returns):
        return _plain
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    moves = torch.Tag.inplace_view in func.tags or schema.name in ("aten::set_", "aten::resize_")
    return _in_place if written == ["self"] and not moves else _alias


def _alias(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _in_place(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Nothing to do on meta; an optimizer's step counters are real."""
    first = args[0]
    tensor = first[0] if isinstance(first, (list, tuple)) else first
    if not tensor.is_meta:
        return func(*args, **kwargs)
    return first if tensor is first else None


def _plain(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    out = tracer.made(func, args, kwargs)
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(tensor, Tensor):
            tracer.register(tensor, func)
    return out


def _with_workspace(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    out = tracer.made(func, args, kwargs)
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    for tensor in outputs[: workspaces.ON_CARD.get(func)]:
        if isinstance(tensor, Tensor):
            tracer.register(tensor, func)
    if outputs[0].is_meta:
        for workspace in workspaces.OF[func]:
            _hidden(tracer, workspace, args, out)
    return out


def _hidden(tracer: Tracer, workspace: Any, args: tuple[Any, ...], out: Any) -> None:
    """What a kernel takes while it runs."""
    sizes = workspace(tracer.card, args, out)
    names = [tracer.allocate(size, workspace.__name__) for size in sizes if size]
    tracer.events.extend((0, name) for name in reversed(names))


def _matmul(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A matrix product; the first of each thread allocates cuBLAS's workspace, for good."""
    out = _plain(tracer, func, args, kwargs)
    backward = torch._C._current_graph_task_id() != -1
    if backward not in tracer.handles and out.is_meta:
        tracer.handles.add(backward)
        tracer.allocate(workspaces.cublas(tracer.card), "cublas")
    return out


def _add(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """An addition. Where two gradients meet, the engine adds into the first if nobody else holds

    it (can_accumulate_inplace of input_buffer.cpp), but not while a dispatch mode is active.
    """
    if sys._getframe(2).f_code.co_name == "_engine_run_backward" and not torch.is_grad_enabled():
        first = args[0]
        if first.is_meta and _holders(first) == tracer.nobody_else and _is_dense(first):
            return first
    return _plain(tracer, func, args, kwargs)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many references there are to a tensor, and to its storage."""
    storage = tensor.untyped_storage()
    return tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)


@cache
def _nobody_else() -> tuple[int, int]:
    """The references that the call of an operator alone accounts for, in this version of torch."""
    found: list[tuple[int, int]] = []

    class Probe(Tracer):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is aten.add.Tensor:
                found.append(_holders(args[0]))
                return func(*args)
            return _plain(self, func, args, kwargs or {})

    x = torch.empty(1, device="meta", requires_grad=True)
    with torch.enable_grad(), Probe(Card()):
        torch.stack([x * 2, x * 3]).sum().backward()
    return found[0]


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride != expected:
                return False
            expected *= length
    return True


def _index_put(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """What the backward of indexing does in place, but not while a mode is active: index_backward."""
    if torch._C._current_graph_task_id() == -1 or not args[0].is_meta:
        return _plain(tracer, func, args, kwargs)
    _hidden(tracer, workspaces.index_put, args, args[0])
    return args[0]


def _scalar(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """The value of a meta tensor, which transformers asks of its masks.

    The positions of a row are those of one sequence; a mask that is given has padding in it.
    """
    if not args[0].is_meta:
        return func(*args, **kwargs)
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "find_packed_sequence_indices":
            return True
        frame = frame.f_back
    return False if args[0].dtype == torch.bool else 0


def _unsafe_view(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    return aten.view.default(*args)  # a view, though its schema says it is not; and this is C++


_SPECIAL: dict[Any, Any] = {
    aten.mm.default: _matmul,
    aten.addmm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.baddbmm.default: _matmul,
    aten.add.Tensor: _add,
    aten.index_put.default: _index_put,
    aten._unsafe_view.default: _unsafe_view,
    aten._local_scalar_dense.default: _scalar,
}
