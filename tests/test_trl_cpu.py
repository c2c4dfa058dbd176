"""The recipe's steps and TRL's own trainers, both run whole on a CPU: how much is alive at most.

TRL 1.16 runs here. What 1.12, the last with PPOTrainer, kept alive was recorded by `make trl112`:
the two releases cannot share an environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from live import of_our_step  # noqa: E402
from trl_plans import TINY, tiny_plan_of  # noqa: E402

pytestmark = pytest.mark.oracle
HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "data" / "trl_1.12_cpu.json").read_text())
OURS = 0.01  # of the peak: small tensors that one of the two does without


def alive(knobs: dict[str, Any]) -> int:
    return max(of_our_step(tiny_plan_of(knobs)).values())


@pytest.mark.parametrize("run", RECORDED["runs"], ids=lambda run: str(list(run["plan"].values())))
def test_ppo_keeps_what_trl_kept(run: dict[str, Any]) -> None:
    theirs = run["bytes"]
    ours = of_our_step(tiny_plan_of(run["plan"]))
    assert max(ours.values()) == pytest.approx(max(theirs.values()), rel=OURS)
    for phase in ("update.forward", "update.backward", "score.reference"):
        assert ours[phase] == pytest.approx(theirs[phase], rel=OURS), phase
    rollout = max(peak for name, peak in ours.items() if name.startswith("rollout"))
    assert rollout == pytest.approx(theirs["rollout"], rel=OURS)


def test_what_was_recorded() -> None:
    assert [run["plan"] for run in RECORDED["runs"]] == [p for p in TINY if p["method"] == "ppo"]
    assert RECORDED["versions"]["trl"] == "1.12.0"
    assert RECORDED["source"] and RECORDED["checked"]


def test_other_trainers_keep_what_ours_keep() -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"trl {trl.__version__} is not the release that the recipe follows")
    numbers = [number for number, knobs in enumerate(TINY) if knobs["method"] != "ppo"]
    run = subprocess.run(
        [sys.executable, str(HERE / "record_trl.py"), "--plan", *map(str, numbers)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        **{"capture_output": True, "text": True, "timeout": 300},
    )
    assert run.returncode == 0, run.stderr
    theirs = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]
    for number, peaks in zip(numbers, theirs, strict=True):
        assert alive(TINY[number]) == pytest.approx(max(peaks.values()), rel=OURS), TINY[number]
