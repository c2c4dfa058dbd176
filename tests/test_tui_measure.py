"""Measure: a real step in a subprocess beside the screen, saved only when it is asked to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from screen import drive, press, question, text
from textual.pilot import Pilot

from fitcheck import archive, fit, timings
from fitcheck.gpu import GIB
from fitcheck.machine import Machine, Ram
from fitcheck.tui import process
from fitcheck.tui.app import FitCheckApp
from fitcheck.tui.measure import Measure
from fitcheck.tui.records import nearest

NO_GPU = Machine(
    accelerators=(), ram=Ram(32 * GIB, 20 * GIB), cpus=2, system="Linux", notes=(), raw=()
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's measurements are kept, instead of the catalog."""
    monkeypatch.setattr(timings, "folder", lambda: str(tmp_path))
    monkeypatch.setattr("fitcheck.here.machine.detect", lambda: NO_GPU)
    return tmp_path


def words(app: FitCheckApp) -> str:
    return " ".join(text(app).split())


async def until(pilot: Pilot[Any], shown: str) -> None:
    for _ in range(600):
        await pilot.pause(0.05)
        if shown in words(pilot.app):
            return
    raise AssertionError(text(pilot.app))


def test_the_records_nearest_to_the_plan_come_first() -> None:
    found = nearest(question(method="sft", tuning="lora", precision="bf16"))
    assert [row.method for row in found] == ["sft"] * len(found)
    assert "lora" in found[0].settings and "bf16" in found[0].settings
    assert found[0].error("estimate") is not None


@pytest.mark.oracle
def test_a_step_is_measured_and_saved(folder: Path) -> None:
    async def script(pilot: Pilot[Any]) -> None:
        await press(pilot, "b")
        assert "no GPU here" in words(pilot.app)
        assert "nothing measured yet" in words(pilot.app)
        await press(pilot, "b")
        await until(pilot, "whole step")
        (result,) = pilot.app.measurements
        assert result.report.source == "measured" and result.run.device == "cpu"
        estimate = fit(result.report.plan)
        assert abs(estimate.allocated_bytes / result.report.allocated_bytes - 1) < 0.02
        assert list(folder.iterdir()) == []
        await press(pilot, "s")
        await until(pilot, "saved")
        (file,) = folder.iterdir()
        run = archive.read(file).runs[0]
        assert run.measured.allocated_bytes == result.report.allocated_bytes
        assert run.predicted["estimate"].allocated_bytes == estimate.allocated_bytes

    drive(script, (100, 40), app=FitCheckApp(question(method="sft"), found=NO_GPU))


def test_stopping_asks_the_process_to_say_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[int] = []
    stopped = asyncio.Event()

    class Child:
        def send_signal(self, number: int) -> None:
            signals.append(number)
            stopped.set()

    async def lines(*asked: Any) -> AsyncIterator[dict[str, Any]]:
        asked[-1](Child())
        yield {"phase": "update.forward", "step": 1}
        await stopped.wait()

    monkeypatch.setattr(process, "lines", lines)
    monkeypatch.setattr(process, "find_spec", lambda name: object())

    async def script(pilot: Pilot[Any]) -> None:
        await press(pilot, "b", "b")
        await until(pilot, "step 1 of 3 update.forward")
        await press(pilot, "b")
        await until(pilot, "nothing measured yet")
        assert isinstance(pilot.app.screen, Measure) and not pilot.app.screen.running

    drive(script)
    assert len(signals) == 1


def test_a_served_session_measures_only_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def lines(*asked: Any) -> AsyncIterator[dict[str, Any]]:
        raise AssertionError("it ran")
        yield {}

    monkeypatch.setattr(process, "lines", lines)
    monkeypatch.setattr(process, "find_spec", lambda name: object())

    async def script(pilot: Pilot[Any]) -> str:
        await press(pilot, "b", "b")
        return words(pilot.app)

    shown = drive(script, app=FitCheckApp(question(), may_measure=False))
    assert "measuring is off" in shown and "--allow-measure" in shown
