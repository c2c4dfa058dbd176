"""The dry run's trace against what the CUDA build of PyTorch allocated: tests/record_cuda.py."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from fitcheck.bench import loops  # noqa: E402
from fitcheck.bench import trace as tracing  # noqa: E402
from fitcheck.bench.allocator import Allocator, replay  # noqa: E402
from fitcheck.bench.attention import as_on_cuda  # noqa: E402
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
        gc.collect()
        begin = len(tracer.events)
        call()
        end = len(tracer.events)
    assert most_held(tracer.events[begin:end]) == RECORDED["operators"][name]


def peaks(traced: tracing.Trace) -> dict[str, tuple[int, int]]:
    """The allocator's peaks in each phase of the last step: (allocated, reserved)."""
    replayed = replay(traced.events, Allocator(), traced.marks)
    found: dict[str, tuple[int, int]] = {}
    for (index, name), peak in zip(traced.marks, replayed.marks, strict=True):
        if index >= traced.starts[-1] and name != tracing.NOWHERE:
            allocated, reserved = found.get(name, (0, 0))
            found[name] = max(allocated, peak.allocated), max(reserved, peak.reserved)
    return found


@pytest.mark.parametrize("number", range(len(PLANS)), ids=lambda n: f"{n}-{PLANS[n][2]['method']}")
def test_step_peaks_as_on_cuda(number: int) -> None:
    recorded = RECORDED["steps"][number]
    name, layers, knobs = PLANS[number]
    assert (recorded["model"], recorded["layers"], recorded["knobs"]) == (name, layers, knobs)
    found = peaks(tracing.trace(plan_of(name, layers, knobs)))
    assert list(found) == list(recorded["peaks"])
    for phase, (allocated, _) in recorded["peaks"].items():
        assert found[phase][0] == pytest.approx(allocated, rel=1e-3), phase
    reserved = max(reserved for _, reserved in recorded["peaks"].values())
    assert max(reserved for _, reserved in found.values()) == pytest.approx(reserved, rel=1e-2)
