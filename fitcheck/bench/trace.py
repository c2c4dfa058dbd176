"""Trace a plan's real training step on `meta` tensors: every allocation, who made it, and when.

traced = trace(plan)   # two whole steps: Adam's states appear in the first
traced.events          # for fitcheck.bench.replay
traced.held(i)         # who holds how much after event i: {Holder: bytes}
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fitcheck import kernels
from fitcheck.bench import loops, operators, roles, steps
from fitcheck.bench.attention import as_on_cuda, implementation
from fitcheck.bench.naming import Holder, Made, Names
from fitcheck.bench.recorder import Recorder
from fitcheck.bench.replay import Rounds
from fitcheck.bench.tracer import Tracer
from fitcheck.plan import Plan

T = TypeVar("T")

REPEATS = 2  # rounds traced of a loop over micro-batches or chunks, which are alike from then on
DECODE_STEPS = 3  # traced of a rollout: the first, and two alike
BLOCK = 512  # the allocator's smallest block
NOWHERE = "-"  # between phases


@dataclass(slots=True)
class Trace:
    """Every allocation of a plan's steps, in order; ids name allocations."""

    plan: Plan
    events: list[tuple[int, int]]  # (bytes, id) allocates, (0, id) frees, (-1, 0) empties the cache
    marks: list[tuple[int, str]]  # (index into events, phase that begins there)
    made_by: list[Any]  # by id: the operator
    where: list[str]  # by id: the module that ran
    lasting: dict[int, Holder]  # by id: weights, gradients, optimizer states
    weights: set[int]  # how many elements they have
    starts: list[int] = field(default_factory=list)  # where each step begins, in events
    rounds: list[Rounds] = field(default_factory=list)  # of loops, that were not traced

    def phases(self) -> Iterator[tuple[int, int, int, str]]:
        """(first event, end, step, phase) of each stretch, in order; a phase may come often."""
        bounds = [*self.marks, (len(self.events), NOWHERE)]
        for (begin, name), (end, _) in zip(bounds, bounds[1:], strict=False):
            if end > begin:
                yield begin, end, sum(start <= begin for start in self.starts[1:]), name

    def peaks(self) -> dict[tuple[int, str], int]:
        """The event at which each phase of each step holds most, in 512-byte blocks."""
        sizes: dict[int, int] = {}
        held = 0
        most: dict[tuple[int, str], int] = {}
        at: dict[tuple[int, str], int] = {}
        for begin, end, step, phase in self.phases():
            key, largest = (step, phase), most.get((step, phase), 0)
            for i in range(begin, end):
                size, name = self.events[i]
                if size > 0:
                    sizes[name] = size = -(-size // BLOCK) * BLOCK
                    held += size
                    if held > largest:
                        largest, at[key] = held, i
                elif size == 0:
                    held -= sizes.pop(name)
            most[key] = largest
        return at

    def held(self, indices: Sequence[int]) -> list[dict[Holder, int]]:
        """Who holds how many bytes just after each of these events (in order)."""
        alive: dict[int, tuple[int, str, int]] = {}  # id -> bytes, phase, its first event
        result: list[dict[Holder, int]] = []
        wanted = iter([*indices, -1])
        index = next(wanted)
        for begin, end, _, phase in self.phases():
            seen = []
            for i in range(begin, end):
                size, name = self.events[i]
                if size > 0:
                    alive[name] = (size, phase, begin)
                elif size == 0:
                    del alive[name]
                if i == index:
                    seen.append(alive.copy())
                    index = next(wanted)
            result += [self._grouped(moment, alive, begin) for moment in seen]
        return result

    def _grouped(
        self, moment: dict[int, tuple[int, str, int]], later: Container[int], begin: int
    ) -> dict[Holder, int]:
        """What is alive at a moment of the stretch that begins there, and `later` at its end."""
        names, groups = Names(self.plan, self.weights), dict[Holder, int]()
        for name, (size, phase, born) in moment.items():
            holder = self.lasting.get(name)
            if holder is None:
                kept = born < begin or name in later
                made = Made(str(self.made_by[name]), self.where[name], phase, size, kept)
                holder = names.of(made)
            groups[holder] = groups.get(holder, 0) - (-size // BLOCK) * BLOCK
        return groups

    def maker(self, name: int) -> str:
        """The operator that made an allocation, and the module that called it."""
        module = self.where[name]
        return f"{self.made_by[name]}" + (f" in {module}" if module else "")


def trace(
    plan: Plan,
    count: int = 2,
    progress: Callable[[str], None] | None = None,
) -> Trace:
    """Trace `count` steps of the plan, loading included.

    progress: called with the name of each phase as it begins.
    """
    card = kernels.card(plan.gpu)
    tracer = Tracer(card)
    recorder = TraceRecorder(tracer, progress)
    result = Trace(
        *(plan, tracer.events, recorder.marks, tracer.made_by, tracer.where),
        *(recorder.lasting, recorder.weights),
    )
    with ExitStack() as stack:
        on_card = as_on_cuda(card.capability), operators.foreach_kernels()
        for context in (*on_card, _no_garbage_collection(), tracer):
            stack.enter_context(context)
        with recorder.phase("load"):
            attention = implementation(plan.attention)
            built = recorder.roles = roles.build(plan, torch.device("meta"), attention)
            recorder.label_weights()
        stack.enter_context(_module_names(tracer, built))
        for _ in range(count):
            recorder.steps += 1
            result.starts.append(len(tracer.events))
            steps.run_step(plan, built, recorder)
        result.rounds = recorder.rounds
        result.events = list(tracer.events)  # what is freed after the last step is no part of it
    return result


class TraceRecorder(Recorder):
    """The recorder of a traced step: marks phases, cuts loops short, names what phases leave."""

    def __init__(self, tracer: Tracer, progress: Callable[[str], None] | None = None) -> None:
        self.tracer = tracer
        self.progress = progress or (lambda phase: None)
        self.roles: Any = None
        self.marks: list[tuple[int, str]] = []
        self.rounds: list[Rounds] = []
        self.lasting: dict[int, Holder] = {}
        self.weights: set[int] = set()  # how many elements they have
        self.parameters: dict[str, list[nn.Parameter]] = {}  # by role
        self.steps = 0  # of the plan, begun so far
        self.updates = 0  # of an optimizer, done so far

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self.marks[-1][1] if self.marks else NOWHERE
        self.marks.append((len(self.tracer.events), name))
        self.progress(name)
        yield
        if name.endswith("backward"):
            for role, parameters in self.parameters.items():
                self._label(role, "gradients", (p.grad for p in parameters))
        elif name.endswith("step"):
            self.updates += 1
            self._label_states()
        self.marks.append((len(self.tracer.events), outer))

    def repeat(self, rounds: Sequence[T]) -> Iterator[T]:
        """The first two rounds; of minibatches one, once optimizer states exist."""
        updates = self.updates
        for done, item in enumerate(rounds, 1):
            begin = len(self.tracer.events)
            yield item
            if done == REPEATS or (self.updates > updates and self.steps > 1):
                if done < len(rounds):
                    end = len(self.tracer.events)
                    self.rounds.append(Rounds(begin, end, len(rounds) - done))
                return

    def decode(self, steps: range) -> Iterator[int]:
        """The first steps of a rollout; when they are over, the events of all the others."""
        bounds = [len(self.tracer.events)]
        for done, step in enumerate(steps, 1):
            yield step
            bounds.append(len(self.tracer.events))
            if done >= DECODE_STEPS and loops.alike(self.tracer, bounds[-3:]):
                loops.extend(self.tracer, bounds[-3:], len(steps) - done, self._window)
                return

    def empty_cache(self) -> None:
        self.tracer.events.append((-1, 0))

    def _window(self, module: str) -> int:
        """The tokens that the cache of the layer around that module keeps; 0: all of them."""
        config = self.roles.policy.config.get_text_config()
        layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", module)
        kinds = getattr(config, "layer_types", None)
        kind = kinds[int(layer[1])] if kinds and layer else "sliding_attention"
        window = {
            "sliding_attention": "sliding_window",
            "chunked_attention": "attention_chunk_size",
        }
        return (getattr(config, window.get(kind, ""), None) or 0) if layer else 0

    def label_weights(self) -> None:
        for role in ("policy", "reference", "reward", "critic", "value_head"):
            if isinstance(module := getattr(self.roles, role), nn.Module):
                owner = "policy" if role == "value_head" else role
                adapters = [p for path, p in module.named_parameters() if "lora_" in path]
                self._label(owner, "adapters", adapters)
                self._label(owner, "weights", (*module.parameters(), *module.buffers()))
                self.parameters[owner] = [*self.parameters.get(owner, ()), *module.parameters()]
                self.weights |= {p.numel() for p in module.parameters()}
        self._label_states()

    def _label_states(self) -> None:
        owner = {id(p): role for role, own in self.parameters.items() for p in own}
        for name in ("policy_training", "critic_training"):
            training = getattr(self.roles, name)
            for optimizer in _optimizers(training and training.optimizer):
                masters = getattr(optimizer, "copies", ())
                self._label(name.partition("_")[0], "optimizer states", masters)
                for weight, state in getattr(optimizer, "state", {}).items():
                    role = owner.get(id(weight), name.partition("_")[0])  # one may train both
                    self._label(role, "optimizer states", state.values())

    def _label(self, role: str, kind: str, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_meta:
                name = self.tracer.register(tensor, "not seen being made")
                self.lasting.setdefault(name, Holder(role, kind, ""))


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those inside it."""
    if optimizer is not None:
        yield optimizer
        for part in (getattr(optimizer, "inner", None), *getattr(optimizer, "parts", ())):
            yield from _optimizers(part)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Reference counts alone free tensors; when cycles are collected is no property of a step."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _module_names(tracer: Tracer, built: roles.Roles) -> Iterator[None]:
    """Keep `tracer.modules` the stack of the modules that run, recomputation included."""
    names: dict[int, str] = {}
    for role in ("policy", "reference", "reward", "critic"):
        if isinstance(owner := getattr(built, role), nn.Module):
            for path, module in owner.named_modules():
                names.setdefault(id(module), f"{role}.{path}")

    def enter(module: nn.Module, *_: Any) -> None:
        tracer.modules.append(names.get(id(module), type(module).__name__))

    def leave(*_: Any) -> None:
        tracer.modules.pop()

    hooks = nn.modules.module
    handles = (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
