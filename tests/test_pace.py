"""The words of speed: units that suit, the error beside the figure, what is not known said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fitcheck import pace
from fitcheck.answer import resolve
from fitcheck.fit import fit
from fitcheck.report import Report
from fitcheck.speed import measured_speed


def answer(**wishes: Any) -> Report:
    return fit(resolve("qwen2.5-1.5b", **({"gpu": "a100 80", "method": "sft"} | wishes)))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0.00123, "1.23 ms"), (0.9, "900 ms"), (0.9999, "1 s"), (63.71, "63.7 s")),
        *((599, "599 s"), (600, "10 minutes"), (36_000, "10 hours"), (1e6, "278 hours")),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert pace.duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0.0, "0.00"), (0.104, "0.10"), (9.99, "9.99"), (28.31, "28.3"), (4321, "4,321")],
)
def test_cells(seconds: float | None, words: str) -> None:
    assert pace.cell(seconds) == words


def test_the_error_stands_beside_the_figure() -> None:
    told = pace.pace(answer())
    assert " a step, " in told
    assert "tokens/s trained on; 90 % of checks within " in told
    both = pace.pace(answer(method="ppo"))
    assert both.count(" % (") == 2  # decoding, training
    assert both.endswith("no whole PPO step is among them")
    assert "the first after" in pace.pace(answer(method="inference"))


def test_what_is_measured_has_no_error() -> None:
    report = answer()
    measured = measured_speed(report.plan, report.phases, "fitcheck bench, 2026-11-27")
    told = pace.pace(replace(report, speed=measured))
    assert told.endswith("; measured (fitcheck bench, 2026-11-27)")


def test_what_is_not_known_is_said() -> None:
    report = replace(answer(), speed=None)
    assert pace.pace(report).startswith("unknown")
    assert pace.pace(replace(report, source="measured")).startswith("not measured")
