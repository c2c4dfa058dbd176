"""The home screen: what it says is what the plan's report says, whatever is pressed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from screen import drive, press, question, settle, text
from textual.pilot import Pilot

from fitcheck import FitCheckError, fit
from fitcheck.cli import main
from fitcheck.text import WORDS, gib
from fitcheck.tui import knobs, view
from fitcheck.tui.app import FitCheckApp
from fitcheck.tui.tips import tips

ROOT = Path(__file__).parent.parent
SIZES = [(60, 20), (80, 24), (100, 30), (120, 34), (160, 45), (200, 60)]


@pytest.mark.parametrize("size", [(80, 24), (160, 45)], ids=["80x24", "160x45"])
def test_golden(size: tuple[int, int], golden: Callable[[str, str], None]) -> None:
    async def script(pilot: Pilot[Any]) -> str:
        await settle(pilot, judged=True)
        return text(pilot.app)

    golden(f"tui-fit-{size[0]}x{size[1]}", drive(script, size))


def test_the_readme_shows_this_screen(request: pytest.FixtureRequest) -> None:
    now = (ROOT / "tests/golden/tui-fit-80x24.txt").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if request.config.getoption("--update-golden"):
        (ROOT / "README.md").write_text(readme.replace(shown, now), encoding="utf-8", newline="\n")
    else:
        assert shown == now


@pytest.mark.parametrize("size", SIZES, ids=[f"{w}x{h}" for w, h in SIZES])
def test_layout(size: tuple[int, int]) -> None:
    async def script(pilot: Pilot[Any]) -> str:
        return text(pilot.app)

    rows = drive(script, size).splitlines()
    assert [len(row) for row in rows] == [size[0]] * size[1]
    assert "PRETEND" in rows[0] and "Llama-3.1-8B" in rows[0]
    assert "DOES NOT FIT" in rows[1] and "too much" in rows[1]
    assert "23.7 GiB usable ▲" in rows[3]
    assert "▸ tuning" in "\n".join(rows)
    assert "? help" in rows[-1] and "q quit" in rows[-1]


def test_a_notch_changes_plan_and_answer_and_undo_brings_both_back() -> None:
    async def script(pilot: Pilot[Any]) -> list[tuple[str, str]]:
        seen = []
        for keys in ([], ["h"], ["h"], ["u", "u"]):
            await press(pilot, *keys)
            seen.append((pilot.app.view.plan.tuning, text(pilot.app).splitlines()[1]))
        return seen

    seen = drive(script)
    assert [tuning for tuning, _ in seen] == ["qlora", "lora", "full", "qlora"]
    for tuning, row in seen:
        report = fit(question(tuning=tuning))
        assert WORDS[report.verdict][1] in row
        assert f"needs {gib(report.peak_bytes)}" in row
    assert seen[0] == seen[3]


def test_the_hint_prices_what_a_notch_then_does() -> None:
    async def script(pilot: Pilot[Any]) -> tuple[str, int]:
        before = pilot.app.view.report.peak_bytes
        hint = text(pilot.app).splitlines()[-2]
        await press(pilot, "h")
        return hint, pilot.app.view.report.peak_bytes - before

    hint, change = drive(script)
    assert f"◂ lora +{gib(change)}" in hint


def test_prices_are_differences_of_whole_plans() -> None:
    plan = question()
    left, right = view.prices(plan)["batch"]
    here = fit(plan).peak_bytes
    assert left == fit(question(batch=4)).peak_bytes - here
    assert right == fit(question(batch=16)).peak_bytes - here
    assert view.prices(plan)["micro_batch"][0] is None  # below 1 there is nothing


def test_a_plan_that_makes_no_sense_is_refused_with_its_reason() -> None:
    async def script(pilot: Pilot[Any]) -> tuple[str, Any]:
        before = pilot.app.view
        assert not pilot.app.attempt(lambda: before.plan.change(micro_batch=3))
        await press(pilot)
        return text(pilot.app), pilot.app.view is before

    shown, unchanged = drive(script)
    assert unchanged and "micro-batch 3" in " ".join(shown.split())


def test_a_tip_makes_it_fit_and_undo_takes_it_back() -> None:
    async def script(pilot: Pilot[Any]) -> None:
        await settle(pilot)
        first = pilot.app.view
        assert first.report.verdict == "does-not-fit"
        assert "PRESS 1–5 TO APPLY" in text(pilot.app)
        await press(pilot, "1")
        assert pilot.app.view.report.verdict == "fits"
        assert pilot.app.view.plan != first.plan
        await press(pilot, "u")
        assert pilot.app.view == first

    drive(script)


def test_when_it_fits_the_tips_say_what_may_be_turned_up() -> None:
    async def script(pilot: Pilot[Any]) -> tuple[Any, Any]:
        await settle(pilot)
        assert "ROOM TO SPARE" in text(pilot.app)
        before = pilot.app.view
        await press(pilot, "1")
        return before, pilot.app.view

    plan = question(method="sft", sequence=512)
    before, after = drive(script, app=FitCheckApp(plan))
    (name,) = (n for n in knobs.KNOBS if getattr(before.plan, n) != getattr(after.plan, n))
    value = getattr(after.plan, name)
    assert value > getattr(before.plan, name)
    assert after.report.verdict == "fits"
    try:  # the next value is one too many, for the card or for the model
        assert view.answer(after.plan.change(**{name: value + 1})).verdict != "fits"
    except FitCheckError as refusal:
        assert "more than" in refusal.message


def test_stale_tips_are_not_applied() -> None:
    async def script(pilot: Pilot[Any]) -> None:
        await settle(pilot)
        await pilot.press("h", "1")  # at once: the tips on screen are still the old plan's
        await press(pilot)
        plan = pilot.app.view.plan
        assert plan == question(tuning="lora") or plan in [
            tip.plan for tip in tips(question(tuning="lora"))
        ]

    drive(script)


def test_every_field_of_every_method_has_a_row_and_a_meaning() -> None:
    for method in knobs.METHODS:
        plan = question(method=method, tuning=None)
        rows = knobs.fields_of(plan)
        used = {name for name in knobs.KNOBS if getattr(plan, name) is not None}
        assert set(rows) == used | set(knobs.ALWAYS)
        assert len(rows) == len(set(rows))
        assert all(knobs.doc(name) for name in rows)


def test_a_value_put_back_to_its_default_follows_again() -> None:
    plan = question(tuning=None)
    there = knobs.put(plan, "precision", "bf16")
    assert there.change(tuning="lora").precision == "bf16"
    back = knobs.put(there, "precision", "bf16-mixed")
    assert back.change(tuning="lora").precision == "bf16-autocast"


@pytest.mark.parametrize("method", knobs.METHODS)
def test_notches_lead_there_and_back(method: str) -> None:
    plan = question(method=method, tuning=None)
    for name in knobs.fields_of(plan):
        above = knobs.notch(plan, name, 1)
        if above is None or name in ("gpu", "method"):
            continue
        below = knobs.notch(above, name, -1)
        assert below is not None, name
        assert getattr(below, name) == getattr(plan, name), name


def test_without_a_terminal_the_default_answer_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) in (0, 1)
    assert "GiB usable" in capsys.readouterr().out


def test_it_asks_this_machine_only_where_no_plan_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from fitcheck import machine

    here = machine.Machine(accelerators=(), ram=None, cpus=1, system="Linux", notes=(), raw=())
    monkeypatch.setattr(machine, "detect", lambda: here)

    async def script(pilot: Pilot[Any]) -> tuple[str, str]:
        await pilot.app.workers.wait_for_complete()
        await press(pilot)
        return pilot.app.view.card, text(pilot.app)

    card, shown = drive(script, app=FitCheckApp(watch_machine=True))
    assert card == view.PRETENDED
    assert "No GPU was found here" in " ".join(shown.split())
