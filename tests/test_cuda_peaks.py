"""The estimate against the CUDA build of PyTorch: every phase of real steps of every method.

tests/data/cuda_step_peaks.json was recorded by running fitcheck.bench's own steps on the CUDA build
of PyTorch 2.13.0, on a host without a GPU: its operators, kernel choice, hidden workspaces and
caching allocator are the real ones, nothing is computed. (It is a machine of 8.0 capability.)
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from fitcheck import Report, fit, resolve
from fitcheck.report import ALLOCATED

DATA = json.loads((Path(__file__).parent / "data" / "cuda_step_peaks.json").read_text())
RUNS: list[dict[str, Any]] = DATA["runs"]
PEAK, TYPICAL, PHASE = 0.015, 0.005, 0.05  # of one plan, their median, of one phase


def estimate(run: dict[str, Any]) -> Report:
    fields = {"gpu": "NVIDIA A100-SXM4-80GB", **run["plan"]}
    return fit(resolve(fields.pop("model"), **fields))


def name(run: dict[str, Any]) -> str:
    return " ".join(str(v) for v in run["plan"].values())


def off(run: dict[str, Any]) -> float:
    return estimate(run).allocated_bytes / max(run["allocated_bytes"].values()) - 1


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_peak_and_every_phase(run: dict[str, Any]) -> None:
    assert abs(off(run)) < PEAK
    phases = {
        phase.name: max(moment.part(ALLOCATED) for moment in phase.moments)
        for phase in estimate(run).phases
    }
    for phase, measured in run["allocated_bytes"].items():
        assert abs(phases[phase] / measured - 1) < PHASE, phase


def test_median_error() -> None:
    assert median(abs(off(run)) for run in RUNS) < TYPICAL


def test_data_says_how_it_was_made() -> None:
    assert DATA["versions"]["torch"].startswith("2.13.0")
    assert DATA["source"] and DATA["checked"]
    assert {run["plan"]["method"] for run in RUNS} == {"sft", "reward", "dpo", "grpo", "ppo"}
