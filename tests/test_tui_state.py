"""What is kept between sessions: it comes back as it was, and a damaged file is never fatal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from screen import drive, press, question, settle, text
from textual.pilot import Pilot

from fitcheck.tui import state
from fitcheck.tui.app import FitCheckApp
from fitcheck.tui.state import State
from fitcheck.tui.view import PRETENDED


def test_plan_pins_and_theme_come_back() -> None:
    plans = [question(), question(tuning=None, method="dpo"), question(offload=("reward",))]
    kept = State(plans[0], live=False, pins=tuple(plans), theme="nord")
    assert state.load() == (State(), "")
    assert state.save(kept) == ""
    assert state.load() == (kept, "")
    again = state.load()[0].pins[0]
    assert again.given == plans[0].given  # what was a default still follows


def test_a_session_begins_where_the_last_one_ended() -> None:
    async def first(pilot: Pilot[Any]) -> None:
        await press(pilot, "h", "c", "c", "escape")
        pilot.app.theme = "nord"
        state.save(pilot.app.state())

    drive(first)
    kept, said = state.load()
    assert said == "" and kept.live is False

    async def second(pilot: Pilot[Any]) -> None:
        assert pilot.app.view.plan == question(tuning="lora")
        assert pilot.app.pins == [question(tuning="lora")]
        assert (pilot.app.theme, pilot.app.view.card) == ("nord", PRETENDED)

    drive(second, app=FitCheckApp(state=kept))


def test_a_card_that_the_catalog_lacks_does_not_spoil_the_state() -> None:
    plan = question()
    strange = plan.change(gpu=replace(plan.gpu, id="this-machine/strange"))
    assert state.save(State(strange, live=True, pins=(strange, plan), theme="nord")) == ""
    assert state.load() == (State(None, live=True, pins=(plan,), theme="nord"), "")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"plan": 3}',
        '{"pins": "all"}',
        '{"theme": 7}',
        '{"unknown": 1}',
        '{"plan": {"model": "no-such-model", "gpu": "4090"}}',
        '{"plan": {"model": "openai-community/gpt2", "gpu": "4090", "batch": -1}}',
        '{"plan": {"model": "openai-community/gpt2", "gpu": "4090", "batch": {}}}',
        '{"pins": [{"model": "openai-community/gpt2"}]}',
        "[" * 100_000,
        "\x00\xff",
        " " * (2**20 + 1),
    ],
    ids=lambda content: content[:24].strip("\x00") or "blank",
)
def test_a_damaged_file_is_set_aside_and_reported(content: str) -> None:
    file = state.path()
    file.parent.mkdir(parents=True)
    file.write_text(content, encoding="latin-1")
    kept, said = state.load()
    assert kept == State()
    aside = file.with_suffix(".broken.json")
    assert str(aside) in said
    assert not file.exists() and aside.read_text(encoding="latin-1") == content

    async def script(pilot: Pilot[Any]) -> str:
        await settle(pilot)
        return " ".join(text(pilot.app).split())

    if content == "{":
        assert "Set aside" in drive(script, app=FitCheckApp(question(), state=kept, said=said))


def test_a_file_that_cannot_be_written_is_reported_not_fatal() -> None:
    folder = state.path().parent
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a folder should be")
    assert "cannot be written" in state.save(State())


def test_nothing_of_the_machine_is_kept_but_the_card() -> None:
    plan = question()
    values = json.dumps(state.written(plan))
    assert json.loads(values)["gpu"] == plan.gpu.id
    assert "memory" not in json.loads(values)
