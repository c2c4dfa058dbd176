"""The picker: searching the catalog, and each row's verdict under the plan as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from screen import drive, press, question, settle, text
from textual.pilot import Pilot
from textual.widgets import Input

from fitcheck import FitCheckError, catalog, fit, hub
from fitcheck.plan import METHODS
from fitcheck.text import gib
from fitcheck.tui import state
from fitcheck.tui.candidates import Query, candidates, judgement, matching, told
from fitcheck.tui.knobs import fields_of, shown
from fitcheck.tui.picker import Pick, Picker
from fitcheck.tui.view import PRETENDED


def labels(search: str, field: str = "model") -> list[str]:
    found = candidates(question(), field)
    return [c.label for c in matching(found, Query.parse(search, field))]


def test_every_word_must_appear_in_name_family_or_licence() -> None:
    assert "Qwen3-8B" in labels("qwen3 8b")
    assert len(labels("qwen apache")) < len(labels("qwen"))
    assert "Qwen3-8B" not in labels("qwen3 mit")
    assert labels("no-such-model") == []


@pytest.mark.parametrize(
    ("search", "field", "low", "high"),
    [("1b..3b", "model", 1e9, 3e9), ("..500m", "model", 0, 5e8), ("16..24", "gpu", 16, 24)],
)
def test_sizes_are_a_range(search: str, field: str, low: float, high: float) -> None:
    found = matching(candidates(question(), field), Query.parse(search, field))
    assert found and all(low <= candidate.size <= high for candidate in found)
    assert len(found) < len(candidates(question(), field))


def test_every_model_is_there_the_own_family_first() -> None:
    found = candidates(question(), "model")
    assert {c.id for c in found} == {entry["id"] for entry in catalog.model_entries()}
    families = [c.words[1] for c in found]
    assert set(families[: families.count("Llama 3.1")]) == {"Llama 3.1"}


@pytest.mark.parametrize("field", ["model", "gpu", "reward_model", "critic", "tuning", "batch"])
def test_a_row_says_what_choosing_it_gives(field: str) -> None:
    plan = question()
    for candidate in candidates(plan, field)[::25]:
        row = judgement(plan, candidate)
        if row.verdict is None:
            assert row.why
            continue
        report = fit(candidate.change(plan), catalog.stated_error(plan.method, "estimate"))
        assert (row.verdict, row.peak_bytes) == (report.verdict, report.peak_bytes)
        if field == "gpu":
            assert told(row, field).lstrip("+−") == gib(abs(report.spare_bytes))


@pytest.mark.parametrize("method", METHODS)
def test_every_field_has_values_to_choose_from_and_its_own_is_among_them(method: str) -> None:
    plan = question(method=method, tuning=None)
    for field in fields_of(plan):
        found = [c.id for c in candidates(plan, field)]
        now = getattr(plan, field)
        assert now is None or getattr(now, "id", shown(field, now)) in found, field


def test_search_choose_undo() -> None:
    async def script(pilot: Pilot[Any]) -> None:
        first = pilot.app.view
        await press(pilot, "m", *"smollm2", "space", *"360m")
        shown = text(pilot.app)
        assert "SmolLM2-360M" in shown and "Llama-3.1-8B" not in shown.splitlines()[5]
        await press(pilot, "enter")
        assert pilot.app.view.plan.model.id == "HuggingFaceTB/SmolLM2-360M"
        assert "SmolLM2-360M" in text(pilot.app).splitlines()[0]
        await press(pilot, "u")
        assert pilot.app.view == first

    drive(script)


def test_fits_leaves_only_what_fits() -> None:
    async def script(pilot: Pilot[Any]) -> list[str]:
        await press(pilot, "g", *"geforce", "space", *"fits")
        await settle(pilot, judged=True)
        return [c.id for c in pilot.app.screen.query_one(Picker).found]

    shown = drive(script)
    plan = question()
    fitting = {
        c.id
        for c in matching(candidates(plan, "gpu"), Query.parse("geforce", "gpu"))
        if judgement(plan, c).verdict in ("fits", "tight")
    }
    assert fitting and set(shown) == fitting


def test_a_size_is_typed() -> None:
    async def script(pilot: Pilot[Any]) -> int:
        pilot.app.screen.action_go("response")
        await press(pilot, "enter", *"1k", "enter")
        return pilot.app.view.plan.response

    assert drive(script) == 1024


def test_no_match_teaches_how_to_search() -> None:
    async def script(pilot: Pilot[Any]) -> str:
        await press(pilot, "m", *"zzz")
        return text(pilot.app)

    shown = drive(script)
    assert "Nothing matches." in shown and "1b..13b" in shown


def test_reward_models_and_their_choices() -> None:
    async def script(pilot: Pilot[Any]) -> Any:
        pilot.app.screen.action_go("reward_model")
        await press(pilot, "enter", *"skywork", "space", *"1b", "enter")
        return pilot.app.view.plan.reward_model

    assert drive(script).id.startswith("Skywork/")
    assert labels("rule", "reward_model")[0] == "rule"


def test_a_wide_terminal_keeps_the_models_in_sight_and_judges_them_as_knobs_turn() -> None:
    async def script(pilot: Pilot[Any]) -> None:
        for plan in (question(), question(tuning="lora")):
            row = f"✗ Llama-3.1-8B {gib(fit(plan).peak_bytes)} ◀"
            for _ in range(100):  # the rows in view are judged within a moment
                await pilot.pause(0.02)
                if any(row in " ".join(line.split()) for line in text(pilot.app).splitlines()):
                    break
            else:
                raise AssertionError(text(pilot.app))
            await press(pilot, "h")
        await press(pilot, "m", *"qwen3-8b", "enter")
        assert not isinstance(pilot.app.screen, Pick)
        assert pilot.app.view.plan.model.id == "Qwen/Qwen3-8B"
        assert not pilot.app.screen.query_one(Input).has_focus

    drive(script, (160, 45))


def test_a_click_chooses() -> None:
    async def script(pilot: Pilot[Any]) -> str:
        await press(pilot, "g", *"3060")
        rows = text(pilot.app).splitlines()
        line = next(i for i, row in enumerate(rows) if "RTX 3060" in row)
        await pilot.click(offset=(10, line))
        await press(pilot)
        assert pilot.app.view.card == PRETENDED
        return pilot.app.view.plan.gpu.name

    assert "3060" in drive(script)


def test_a_model_elsewhere_is_the_last_row_and_read_only_when_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    model = replace(catalog.find_model("smollm2-135m"), id="somebody/own-135m")

    def find(text: str) -> Any:
        read.append(text)
        if text != model.id:
            raise FitCheckError(f"the Hub has no {text}", "look at its name again")
        return model

    monkeypatch.setattr(hub, "find", find)

    async def script(pilot: Pilot[Any]) -> None:
        first = pilot.app.view
        await press(pilot, "m", *"somebody", "/", *"typo")
        assert "fetch somebody/typo from the Hub" in text(pilot.app)
        await pilot.pause(0.2)
        assert read == []
        await press(pilot, "enter")
        await pilot.app.workers.wait_for_complete()
        await press(pilot)
        assert pilot.app.view == first and "the Hub has no" in text(pilot.app)
        await press(pilot, "m", *"somebody", "/", *"own-135m", "enter")
        await pilot.app.workers.wait_for_complete()
        await press(pilot)
        assert pilot.app.view.plan.model == model
        assert not state.of_catalog(pilot.app.view.plan)  # the next start must not ask the Hub
        await press(pilot, "u")
        assert pilot.app.view == first

    drive(script)
