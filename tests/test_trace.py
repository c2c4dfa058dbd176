"""The dry run's trace against what the CUDA build of PyTorch allocated: tests/record_cuda.py."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from fitcheck.bench import loops  # noqa: E402
from fitcheck.bench import trace as tracing  # noqa: E402
from fitcheck.bench.allocator import Allocator  # noqa: E402
from fitcheck.bench.attention import as_on_cuda  # noqa: E402
from fitcheck.bench.replay import replay  # noqa: E402
from fitcheck.bench.tracer import Tracer  # noqa: E402
from fitcheck.kernels import Card  # noqa: E402
from tests.record_cuda import DATA, OPERATORS, PLANS, plan_of  # noqa: E402

pytestmark = pytest.mark.oracle
RECORDED: dict[str, Any] = json.loads(DATA.read_text())
CARD = Card((8, 0), RECORDED["sms"])


def most_held(events: list[tuple[int, int]]) -> int:
    """The largest sum of blocks of 512 bytes alive at a time."""
    held = most = 0
    sizes: dict[int, int] = {}
    for size, name in events:
        if size > 0:
            sizes[name] = -(-size // 512) * 512
            held += sizes[name]
            most = max(most, held)
        elif size == 0:
            held -= sizes.pop(name, 0)
    return most


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_needs_what_it_needs_on_cuda(name: str) -> None:
    """To the byte: outputs, and what the kernel takes for itself while it runs."""
    tracer = Tracer(CARD)
    with as_on_cuda(CARD.capability), tracer:
        call = OPERATORS[name]("meta")
        call()
        begin = len(tracer.events)
        call()
        end = len(tracer.events)
    assert most_held(tracer.events[begin:end]) == RECORDED["operators"][name]


def peaks(traced: tracing.Trace) -> dict[str, tuple[int, int]]:
    """The allocator's peaks in each phase of the last step: (allocated, reserved)."""
    replayed = replay(traced.events, Allocator(), traced.marks, traced.rounds)
    found: dict[str, tuple[int, int]] = {}
    for (index, name), peak in zip(traced.marks, replayed.marks, strict=True):
        if index >= traced.starts[-1] and name != tracing.NOWHERE:
            allocated, reserved = found.get(name, (0, 0))
            found[name] = max(allocated, peak.allocated), max(reserved, peak.reserved)
    return found


@pytest.mark.parametrize("number", range(len(PLANS)), ids=lambda n: f"{n}-{PLANS[n][2]['method']}")
def test_step_peaks_as_on_cuda(number: int) -> None:
    """Reserved bytes are equal; allocated ones too, but for a handful of scalars.

    1e-4 in a phase: clip_grad_norm_ cannot run its foreach kernels on meta, which need a little.
    """
    recorded = RECORDED["steps"][number]
    name, layers, knobs = PLANS[number]
    assert (recorded["model"], recorded["layers"], recorded["knobs"]) == (name, layers, knobs)
    want, found = recorded["peaks"], peaks(tracing.trace(plan_of(name, layers, knobs)))
    assert list(found) == list(want)
    for phase, (allocated, _) in want.items():
        assert found[phase][0] == pytest.approx(allocated, rel=1e-4), phase
    allocated, reserved = (max(peak[i] for peak in found.values()) for i in (0, 1))
    assert allocated == pytest.approx(max(peak[0] for peak in want.values()), abs=4096)
    assert reserved == max(peak[1] for peak in want.values())


def small(**knobs: Any) -> Any:
    """A plan of two layers that is traced in a moment."""
    return plan_of("Qwen/Qwen2.5-0.5B", 2, {"precision": "bf16"} | knobs)


@pytest.fixture(scope="module")
def rollout() -> tracing.Trace:
    return tracing.trace(small(method="ppo", prompt=20, response=60, batch=4, micro_batch=4))


def test_every_allocation_is_made_once_and_freed_once(rollout: tracing.Trace) -> None:
    alive: set[int] = set()
    for size, name in rollout.events:
        if size > 0:
            assert name not in alive
            alive.add(name)
        else:
            alive.remove(name)
    assert len(rollout.made_by) == len(rollout.where)


def test_generated_decode_steps_are_those_that_would_be_traced(
    rollout: tracing.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "WHOLE", 0)  # small passing tensors are not generated
    brief = tracing.trace(rollout.plan)
    monkeypatch.setattr(tracing, "DECODE_STEPS", 10**9)
    whole = tracing.trace(rollout.plan)
    assert len(brief.events) < len(whole.events)
    assert peaks(whole) == peaks(rollout) == peaks(brief)


def test_generated_steps_grow_up_to_the_window() -> None:
    """A cache of 10 bytes a token, as torch.cat makes it: the old one goes after the new one."""
    tracer = Tracer(CARD)
    with tracer:
        cache = torch.empty(100, dtype=torch.uint8, device="meta")
        bounds = [len(tracer.events)]
        for size in (110, 120):
            cache = torch.empty(size, dtype=torch.uint8, device="meta")
            bounds.append(len(tracer.events))
        loops.extend(tracer, bounds, 5, lambda module: 14)
        del cache
    generated = tracer.events[bounds[-1] :]
    assert [size for size, _ in generated if size] == [130, 140, 140, 140, 140]
    freed = [name for size, name in tracer.events if size == 0]
    assert sorted(freed) == [name for size, name in tracer.events if size > 0]


def test_remembered_shapes_change_nothing(
    rollout: tracing.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracer, "made", lambda self, func, args, kwargs: func(*args, **kwargs))
    assert tracing.trace(rollout.plan).events == rollout.events


def test_who_holds_a_peak(rollout: tracing.Trace) -> None:
    at = rollout.peaks()[1, "update.policy.backward"]
    (held,) = rollout.held([at])
    sizes: dict[int, int] = {}
    for size, name in rollout.events[: at + 1]:
        sizes[name] = -(-size // 512) * 512
    assert sum(held.values()) == sum(sizes.values())
    weights = 2 * rollout.plan.model.params
    named: Counter[tuple[str, str]] = Counter()
    for holder, size in held.items():
        named[holder.role, holder.kind] += size
    assert named["policy", "weights"] == pytest.approx(weights, rel=1e-4)  # blocks of 512 bytes
    assert named["reference", "weights"] == named["policy", "weights"]
    assert named["policy", "optimizer states"] == pytest.approx(2 * weights, rel=1e-4)
    embedding = 2 * rollout.plan.model.params_embedding  # its gradient is not summed up yet
    assert named["policy", "embedding gradient"] == embedding
    # All others' and the tied head's own, in 16 bits.
    assert named["policy", "gradients"] == pytest.approx(weights + embedding, rel=1e-3)


def test_allocations_name_their_module(rollout: tracing.Trace) -> None:
    named = {rollout.maker(name) for name in range(1, len(rollout.made_by))}
    assert "aten.silu.default in policy.model.layers.1.mlp.act_fn" in named


def test_padding_makes_a_mask_of_tokens_by_tokens() -> None:
    """transformers asks a mask on meta whether all of it is true."""
    square = 200 * 200
    for padding, masked in (("padded", True), ("none", False)):
        plan = small(method="sft", sequence=200, batch=1, padding=padding)
        traced = tracing.trace(plan, 1)
        assert any(size == square for size, _ in traced.events) == masked


def test_packed_rows_are_not_seen_where_there_are_none() -> None:
    """transformers asks positions whether they are of one sequence; else it would make a mask."""
    traced = tracing.trace(small(method="sft", sequence=200, batch=2, micro_batch=2), 1)
    assert all(size != 2 * 200 * 200 for size, _ in traced.events)


def test_cublas_takes_its_workspace_once_for_each_thread(rollout: tracing.Trace) -> None:
    assert rollout.made_by.count("cublas") == 2  # forward, and autograd's own


def test_progress_names_the_phases() -> None:
    said: list[str] = []
    tracing.trace(small(method="sft", sequence=64, batch=1), 1, said.append)
    wanted = ["load", "update.forward", "update.loss", "update.backward", "update.step"]
    assert said == wanted
