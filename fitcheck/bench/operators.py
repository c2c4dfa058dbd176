"""How each operator is recorded: by the tensors it makes, not at all, or as CUDA would do it.

While a dispatch mode is active PyTorch takes paths of its own: it adds gradients out of place,
indexes backwards out of place. On `meta` it has no values to give. Those operators are set right
here; what a CUDA kernel takes beside its outputs is in workspaces.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _foreach_utils

from fitcheck.bench import workspaces
from fitcheck.kernels import Card

if TYPE_CHECKING:
    from fitcheck.bench.tracer import Tracer

aten = torch.ops.aten
Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any]], Any]


def rule(func: Any) -> Rule:
    """How to record an operator: by its outputs, not at all (views, in-place), or specially."""
    if special := _SPECIAL.get(func):
        return special
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


def _alias(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _in_place(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Nothing to do on meta; an optimizer's step counters are real."""
    first = args[0]
    tensor = first[0] if isinstance(first, (list, tuple)) else first
    if not tensor.is_meta:
        return func(*args, **kwargs)
    return first if tensor is first else None


def _plain(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = tracer.made(func, args, kwargs)
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(tensor, Tensor):
            tracer.register(tensor, func)
    return out


def _with_workspace(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    out = tracer.made(func, args, kwargs)
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    hidden = workspaces.OF[func] if tracer.watches(outputs[0]) else ()
    before = [workspace for workspace in hidden if workspace in workspaces.BEFORE]
    names = [name for workspace in before for name in _taken(tracer, workspace, args, out)]
    for tensor in outputs[: workspaces.ON_CARD.get(func)]:
        if isinstance(tensor, Tensor):
            tracer.register(tensor, func)
    _freed(tracer, names)
    for workspace in hidden:
        if workspace not in before:
            _hidden(tracer, workspace, args, out)
    return out


def _hidden(tracer: Tracer, workspace: Any, args: tuple[Any, ...], out: Any) -> None:
    """What a kernel takes while it runs."""
    _freed(tracer, _taken(tracer, workspace, args, out))


def _taken(tracer: Tracer, workspace: Any, args: tuple[Any, ...], out: Any) -> list[int]:
    sizes = workspace(tracer.card, args, out)
    return [tracer.allocate(size, workspace.__name__) for size in sizes if size]


def _freed(tracer: Tracer, names: list[int]) -> None:
    tracer.events.extend((0, name) for name in reversed(names))


def _matmul(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A matrix product; the first of each thread allocates cuBLAS's workspace, for good."""
    into = "out" in kwargs
    out = func(*args, **kwargs) if into else _plain(tracer, func, args, kwargs)
    backward = torch._C._current_graph_task_id() != -1
    if backward not in tracer.handles and tracer.watches(out):
        tracer.handles.add(backward)
        tracer.allocate(workspaces.cublas(tracer.card), "cublas")
    return out


def _add(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An addition. Where two gradients meet the engine adds in place, if nobody holds the first.

    But not while a dispatch mode is active: can_accumulate_inplace of input_buffer.cpp.
    """
    if sys._getframe(2).f_code.co_name == "_engine_run_backward" and not torch.is_grad_enabled():
        first = args[0]
        if tracer.watches(first) and _holders(first) == tracer.nobody_else and _is_dense(first):
            return first if first.is_meta else aten.add_.Tensor(*args, **kwargs)
    return _plain(tracer, func, args, kwargs)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many references there are to a tensor, and to its storage."""
    storage = tensor.untyped_storage()
    count: int = tensor._use_count()  # type: ignore[attr-defined]
    return count, torch._C._storage_Use_Count(storage._cdata)


@cache
def nobody_else() -> tuple[int, int]:
    """The references that the call of an operator alone accounts for, in this version of torch."""
    from fitcheck.bench.tracer import Tracer

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


@contextmanager
def foreach_kernels() -> Iterator[None]:
    """Within, torch takes its foreach kernels on meta too, where clipping would go one by one."""
    functions: Any = _foreach_utils
    real = functions._get_foreach_kernels_supported_devices
    functions._get_foreach_kernels_supported_devices = lambda: [*real(), "meta"]
    try:
        yield
    finally:
        functions._get_foreach_kernels_supported_devices = real


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


def _index_put(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Adds in place in the backward of indexing, but not while a mode is active: index_backward."""
    if torch._C._current_graph_task_id() == -1 or not tracer.watches(args[0]):
        return _plain(tracer, func, args, kwargs)
    _hidden(tracer, workspaces.index_put, args, args[0])
    return args[0] if args[0].is_meta else aten.index_put_.default(*args, **kwargs)


def _scalar(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def _unsafe_view(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return aten.view.default(*args)  # a view, though its schema says it is not; and this is C++


def _grouped_mm(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Experts' products. The card multiplies fp32 too; the meta kernel checks for bf16."""
    if args[0].dtype != torch.float32:
        return _plain(tracer, func, args, kwargs)
    narrow = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    out = func(*narrow, **kwargs).float()
    tracer.register(out, func)
    return out


_SPECIAL: dict[Any, Rule] = {
    aten.mm.default: _matmul,
    aten.mm.out: _matmul,
    aten.addmm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.baddbmm.default: _matmul,
    aten._grouped_mm.default: _grouped_mm,
    aten.add.Tensor: _add,
    aten.index_put.default: _index_put,
    aten._unsafe_view.default: _unsafe_view,
    aten._local_scalar_dense.default: _scalar,
}
