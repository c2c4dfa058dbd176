"""Record every allocation that PyTorch code makes on `meta` tensors, as the CUDA build would.

    tracer = Tracer(Card())
    with tracer:
        loss = model(ids).logits.float().mean()
        loss.backward()
    tracer.events  # (bytes, id) allocates, (0, id) frees, (-1, 0) empties the cache

A storage is allocated when the first tensor on it appears, and freed when the last one is gone: the
same moments as on a card, since it is the same code under the same autograd engine. Where that
engine does otherwise because somebody watches, or because the tensors are on `meta`, operators.py
sets it right.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fitcheck.bench import operators
from fitcheck.kernels import Card


class _Ref(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage that knows the storage's address and its id in the trace."""

    __slots__ = ("key", "id")
    key: int
    id: int


class Tracer(TorchDispatchMode):
    """Records while active. Who keeps `modules` learns the module of each allocation, too."""

    def __init__(self, card: Card) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card
        self.events: list[tuple[int, int]] = []
        self.made_by: list[Any] = [None]  # by id: the operator, or a name
        self.where: list[str] = [""]  # by id: the module
        self.modules: list[str] = [""]  # the stack of running modules
        self.twins: dict[int, list[int]] = {}  # generated allocations that end with this id
        self.live: dict[int, int] = {}  # address of a storage -> id
        self.refs: dict[int, _Ref] = {}
        self.rules: dict[int, operators.Rule] = {}  # id of an operator -> how it is recorded
        self.outputs: dict[Any, Any] = {}  # operator and shapes -> what it makes
        self.nobody_else = operators.nobody_else() if type(self) is Tracer else (0, 0)
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
        rule = self.rules.get(id(func))
        if rule is None:
            rule = self.rules[id(func)] = operators.rule(func)
        return rule(self, func, args, kwargs or {})

    def watches(self, tensor: Tensor) -> bool:
        """Whether a tensor is where this tracer counts; others take nothing."""
        return tensor.is_meta

    def register(self, tensor: Tensor, made_by: Any) -> int:
        """The id of a tensor's storage; one not seen before is an allocation. 0: takes nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self.live.get(key)
        if known is not None:
            return known
        size = storage.nbytes()
        if size == 0 or not self.watches(tensor):
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
        key = (id(func), torch.get_default_dtype(), _shapes(args), _shapes(tuple(kwargs.items())))
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
