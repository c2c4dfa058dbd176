"""Measured seconds take the place of estimated ones, for the same plan on the same card only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitcheck import archive, files, pace, timings
from fitcheck.answer import check
from fitcheck.measured import Measurement, Reading, Run
from fitcheck.report import Moment, Phase, Report, Term

WISHES: dict[str, Any] = {"method": "sft", "gpu": "4090", "tuning": "lora", "batch": 4}
SECONDS = {"load": 9.0, "update.forward": 1.0, "update.loss": 0.5, "update.backward": 2.0}
SECONDS |= {"update.step": 0.5}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records."""
    monkeypatch.setattr(timings, "folder", lambda: str(tmp_path))
    return tmp_path


def record(folder: Path, day: str = "2026-11-20", **changes: Any) -> Path:
    """A record of WISHES as bench saves it."""
    plan = json.loads(json.dumps(check("qwen2.5-1.5b", **WISHES).plan.to_json()))
    measured: dict[str, Any] = {
        "seconds": 4.0,
        "phases": [
            {"phase": name, "seconds": value, "allocated_bytes": 1, "reserved_bytes": 1}
            for name, value in SECONDS.items()
        ],
    }
    plan |= changes.pop("plan", {})
    measured |= changes.pop("measured", {})
    content = {"source": "fitcheck bench", "checked": day, "rung": "measured"} | changes
    content["runs"] = [{"id": 1, "plan": plan, "measured": measured}]
    path = folder / f"nvidia-geforce-rtx-4090-{day}-sft-qwen-qwen2.5-1.5b-0123abcd.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def answer(**changes: Any) -> Report:
    return check("qwen2.5-1.5b", **(WISHES | changes))


def is_measured(report: Report) -> bool:
    assert report.speed is not None
    return report.speed.source == "measured"


def test_a_record_replaces_the_estimate_and_says_so(saved: Path) -> None:
    guess = answer()
    assert not is_measured(guess)
    record(saved)
    report = answer()
    assert is_measured(report)
    assert {phase.name: phase.seconds for phase in report.phases} == SECONDS
    assert report.speed is not None
    assert report.speed.step_seconds == 4.0
    assert report.speed.tokens_per_second == 4 * 2048 / 4.0
    assert pace.pace(report).endswith("measured (fitcheck bench, 2026-11-20)")
    assert report.to_json()["speed"]["source"] == "measured"
    assert report.peak_bytes == guess.peak_bytes


def test_what_bench_saves_is_found(saved: Path) -> None:
    plan, ram = answer().plan, answer().ram
    readings = tuple(Reading(name, value, *[2**20] * 4) for name, value in SECONDS.items())
    terms = (Term("tensors", "step", 2**20, ""),)
    phases = tuple(Phase(r.phase, (Moment("largest", terms),), r.seconds) for r in readings)
    run = Run(
        **{"device": "cuda", "card": "NVIDIA GeForce RTX 4090", "versions": {"torch": "2.13.0"}},
        **{"date": "2026-11-27", "warmup": 1, "steps": 2, "asked": 2, "retries": 0, "seconds": 4.0},
    )
    measured = Measurement(Report(plan, phases, ram, source="measured"), run, readings)
    archive.save(archive.record(measured, None, None), saved)
    report = answer()
    assert is_measured(report)
    assert report.speed is not None
    assert report.speed.step_seconds == 4.0


def test_half_a_record_is_none(saved: Path) -> None:
    record(saved, measured={"phases": [{"phase": "update.forward", "seconds": 1.0}]})
    assert not is_measured(answer())


def test_the_newest_record_counts(saved: Path) -> None:
    record(saved, "2026-11-20")
    twice = [{"phase": name, "seconds": 2 * value} for name, value in SECONDS.items()]
    record(saved, "2026-11-21", measured={"phases": twice})
    report = answer()
    assert report.speed is not None
    assert report.speed.step_seconds == 8.0


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 8},
        {"gpu": "3090"},
        {"tuning": "qlora"},
        {"sequence": 1024},
        {"method": "reward"},
    ],
)
def test_another_plan_keeps_its_estimate(saved: Path, changes: dict[str, Any]) -> None:
    record(saved)
    assert not is_measured(answer(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "somebody"},
        {"rung": "counted"},
        {"measured": {"oom": {"phase": "update.step"}}},
        {"measured": {"phases": [1]}},
        {"measured": {"phases": [{"phase": "update.step", "seconds": -1}]}},
        {"plan": {"batch": 99}},
        {"checked": 5},
    ],
)
def test_what_proves_nothing_is_passed_over(saved: Path, changes: dict[str, Any]) -> None:
    record(saved, **changes)
    assert not is_measured(answer())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_none_is_passed_over(saved: Path, content: bytes) -> None:
    record(saved).write_bytes(content)
    assert not is_measured(answer())


def test_a_checkout_keeps_its_records_in_the_catalog() -> None:
    assert Path(timings.folder()) == Path(files.ROOT) / "measurements"


def test_an_installed_program_keeps_them_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "catalog").mkdir()
    monkeypatch.setattr(files, "HERE", str(tmp_path))
    assert Path(timings.folder()).name == "measurements"
    assert tmp_path not in Path(timings.folder()).parents
