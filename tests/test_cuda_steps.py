"""The dry run against the CUDA build of PyTorch: real steps' peaks, and what a limit does to them.

How tests/data/cuda_steps.json was recorded is in cuda_steps.py. Runs that take long to trace are
compared by `make oracle-check`, which is `pytest tests/test_cuda_steps.py --slow`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from fitcheck.bench import trace as tracing  # noqa: E402
from fitcheck.bench.allocator import Allocator  # noqa: E402
from fitcheck.bench.replay import replay  # noqa: E402
from tests.cuda_steps import DATA, Run, plan_of  # noqa: E402

pytestmark = pytest.mark.oracle
RECORDED: dict[str, Any] = json.loads(DATA.read_text())
RUNS: list[Run] = RECORDED["runs"]
NEAR = [number for number, run in enumerate(RUNS) if "limits" in run]
PEAK, PHASE = 0.003, 0.01  # of peak allocated bytes: of the step, of one phase


def name(number: int) -> str:
    run = RUNS[number]
    return f"{number}-{run['plan']['method']}-{run['plan']['model'].split('/')[1]}"


def parameters(numbers: Any) -> list[Any]:
    """Those runs as parameters; what takes longer than a second to trace is marked slow."""
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(n, id=name(n), marks=marks[RUNS[n].get("slow", False)]) for n in numbers]


@cache
def traced(number: int) -> tracing.Trace:
    return tracing.trace(plan_of(RUNS[number]))


def peaks(trace: tracing.Trace) -> dict[str, tuple[int, int]]:
    """The allocator's peaks in each phase of the last step: (allocated, reserved)."""
    replayed = replay(trace.events, Allocator(), trace.marks, trace.rounds)
    found: dict[str, tuple[int, int]] = {}
    for (index, phase), peak in zip(trace.marks, replayed.marks, strict=True):
        if index >= trace.starts[-1] and phase != tracing.NOWHERE:
            allocated, reserved = found.get(phase, (0, 0))
            found[phase] = max(allocated, peak.allocated), max(reserved, peak.reserved)
    return found


@pytest.mark.parametrize("number", parameters(range(len(RUNS))))
def test_peaks_as_on_cuda(number: int) -> None:
    want, found = RUNS[number]["peaks"], peaks(traced(number))
    assert list(found) == list(want)
    for phase, (allocated, _) in want.items():
        assert found[phase][0] == pytest.approx(allocated, rel=PHASE), phase
    allocated = max(peak[0] for peak in want.values())
    assert max(peak[0] for peak in found.values()) == pytest.approx(allocated, rel=PEAK)


@pytest.mark.parametrize("number", parameters(NEAR))
def test_outcome_under_a_limit_as_on_cuda(number: int) -> None:
    """On both sides of every edge: fits, fits after cache flushes, out of memory."""
    trace = traced(number)
    for limit, expandable, outcome in RUNS[number]["limits"]:
        allocator = Allocator(
            limit, total_bytes=RECORDED["total_bytes"], expandable_segments=expandable
        )
        result = replay(trace.events, allocator, trace.marks, trace.rounds)
        ours = "does-not-fit" if result.oom is not None else "tight" if result.retries else "fits"
        assert ours == outcome, (limit, expandable)


def test_data_covers_what_it_should() -> None:
    assert RECORDED["versions"]["torch"].startswith("2.13.0")
    assert RECORDED["source"] and RECORDED["checked"]
    plans = [plan_of(run) for run in RUNS]
    assert len(plans) >= 40
    reached: Callable[[str], set[Any]] = lambda field: {getattr(p, field) for p in plans}  # noqa: E731
    assert reached("method") == {"sft", "reward", "dpo", "grpo", "ppo"}
    assert reached("tuning") == {"full", "lora"}  # 4 bits are bitsandbytes', which needs a card
    assert reached("checkpointing") == {True, False}
    assert reached("padding") == {"padded", "none", "packed"}
    assert reached("attention") == {"sdpa", "flash", "eager"}
    assert {run["card"] for run in RUNS} == {"7.5", "8.0", "8.9", "9.0"}
    sizes = [plan.model.params for plan in plans]
    whole = [size for size, run in zip(sizes, RUNS, strict=True) if "layers" not in run]
    assert min(whole) < 2e8 and max(whole) > 8e9 and median(whole) > 4e8
    outcomes = [outcome for n in NEAR for _, _, outcome in RUNS[n]["limits"]]
    assert {"fits", "tight", "does-not-fit"} == set(outcomes)
