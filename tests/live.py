"""Peaks of live tensors on a CPU, between marks: what a step keeps alive, whoever wrote it.

    with LiveBytes() as live:
        ...                     # build models, run steps
        live.mark("update")     # peaks so far are "load"'s
    live.peaks["load"]

The tracer of the dry run, set on real tensors: no allocator, no CUDA kernels' workspaces.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fitcheck.bench.recorder import Recorder
from fitcheck.bench.tracer import Tracer, _Ref
from fitcheck.kernels import Card


class RealTracer(Tracer):
    """Records real tensors instead of meta ones."""

    def register(self, tensor: Tensor, made_by: Any) -> int:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live or size == 0:
            return self.live.get(key, 0)
        name = self.allocate(size, made_by)
        ref = _Ref(storage, self.freed)
        ref.key, ref.id = key, name
        self.live[key], self.refs[name] = name, ref
        return name


class LiveBytes:
    """Bytes of all tensors alive, at their most between two marks."""

    def __init__(self) -> None:
        self.tracer = RealTracer(Card())
        self.peaks: dict[str, int] = {}
        self.now = "load"
        self.sizes: dict[int, int] = {}
        self.at = self.held = 0

    def __enter__(self) -> LiveBytes:
        self.tracer.__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        self.tracer.__exit__(*fault)

    def mark(self, name: str) -> None:
        peak = self.held
        for size, key in self.tracer.events[self.at :]:
            if size > 0:
                self.sizes[key] = size
                self.held += size
                peak = max(peak, self.held)
            elif size == 0:
                self.held -= self.sizes.pop(key)
        self.at = len(self.tracer.events)
        self.peaks[self.now] = max(self.peaks.get(self.now, 0), peak)
        self.now = name


class LiveRecorder(Recorder):
    """Marks the phases of our own steps."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live

    @contextmanager
    def phase(self, name: str) -> Any:
        outer = self.live.now
        self.live.mark(name)
        yield
        self.live.mark(outer)

    def empty_cache(self) -> None:
        pass


def of_our_step(plan: Any, steps: int = 3) -> dict[str, int]:
    """Peaks of the last of our own steps of a plan, by phase."""
    import torch

    from fitcheck.bench.roles import build
    from fitcheck.bench.steps import run_step

    with LiveBytes() as live:
        roles = build(plan, torch.device("cpu"))
        for _ in range(steps):
            gc.collect()
            live.mark("between")
            live.peaks.clear()
            run_step(plan, roles, LiveRecorder(live))
        live.mark("end")
    return live.peaks
