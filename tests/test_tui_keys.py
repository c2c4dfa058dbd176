"""Whatever is pressed: the screen never crashes, and what it shows is the answer to its plan."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from screen import drive, press, question, settle, text
from terminal import Terminal
from textual.events import Key
from textual.pilot import Pilot

from fitcheck import catalog, fit, timings
from fitcheck.measured import Measurement, Run
from fitcheck.plan import Plan
from fitcheck.text import WORDS, gib
from fitcheck.tui import knobs, process, state
from fitcheck.tui.app import FitCheckApp
from fitcheck.tui.fit import Fit
from fitcheck.tui.state import State

KEYS = [
    *("up", "down", "left", "right") * 6,
    *"hjkl" * 3,
    *("enter", "escape", "tab", "home", "end", "pageup", "pagedown", "backspace", "space") * 2,
    *"12345urmgecdbwyx?/ts+-=0a.",
    *("ctrl+p", "question_mark", "slash", "plus", "minus", "shift+tab", "delete", "f1"),
]
SEED, BATCH = 20261127, 50
COUNTS = {(60, 20): 400, (80, 24): 1200, (160, 45): 400}  # 2,000 in all


def consistent(app: FitCheckApp, size: tuple[int, int]) -> None:
    """The view is its plan's, the rows are whole, and the verdict in sight is the view's."""
    view = app.view
    error = catalog.stated_error(view.plan.method, "estimate")
    assert view.report.peak_bytes == fit(view.plan, error).peak_bytes
    rows = text(app).splitlines()
    assert [cell_len(row) for row in rows] == [size[0]] * size[1]
    if isinstance(app.screen, Fit):
        assert app.screen.field in knobs.fields_of(view.plan)
        assert WORDS[view.report.verdict][1] in rows[1]
        assert f"{gib(view.report.usable_bytes)} GiB usable" in rows[3]
        assert rows[0].startswith(f" FitCheck  {view.plan.method.upper()} · ")


async def said(verb: str, plan: Plan, *more: Any) -> AsyncIterator[dict[str, Any]]:
    """What the processes of dry run and measurement say, at once."""
    yield {"phase": "load", "step": 0}
    run = Run("cpu", "a CPU", {}, "2026-11-27", 1, 2, 2, 0, 1.0)
    yield {"report": Measurement(fit(plan), run, ()).to_json()}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What runs beside the screen has its own tests; what is written is the test's own."""
    monkeypatch.setattr(process, "lines", said)
    monkeypatch.setattr(process, "find_spec", lambda name: object())
    monkeypatch.setenv("XDG_DOWNLOAD_DIR", str(tmp_path))
    monkeypatch.setattr(timings, "folder", lambda: str(tmp_path))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("size", COUNTS, ids=[f"{w}x{h}" for w, h in COUNTS])
def test_two_thousand_random_keys(size: tuple[int, int]) -> None:
    chance = random.Random(f"{SEED} {size}")
    keys = chance.choices(KEYS, k=COUNTS[size])

    async def script(pilot: Pilot[Any]) -> None:
        for i in range(0, len(keys), BATCH):
            await pilot.press(*keys[i : i + BATCH])
            await press(pilot)
            consistent(pilot.app, size)
        for _ in range(8):  # out of whatever is open
            if isinstance(pilot.app.screen, Fit):
                break
            await press(pilot, "escape")
        assert isinstance(pilot.app.screen, Fit)
        await settle(pilot)
        consistent(pilot.app, size)
        while pilot.app.past:
            pilot.app.action_undo()
        await press(pilot)
        assert pilot.app.view.plan == question()

    drive(script, size)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("size", [(80, 24), (160, 45)], ids=["80x24", "160x45"])
def test_keys_faster_than_the_screen(size: tuple[int, int]) -> None:
    """Bursts without a pause, as a paste sends them; Pilot waits 40 ms after each key."""
    characters = {"space": " ", "question_mark": "?", "plus": "+", "minus": "-"}
    keys = [
        key for key in KEYS if key not in ("ctrl+p", "/", "slash", "q")
    ]  # nor Textual's palette
    chosen = random.Random(SEED + size[0]).choices(keys, k=400)

    async def script(pilot: Pilot[Any]) -> None:
        for i in range(0, len(chosen), BATCH):
            for key in chosen[i : i + BATCH]:
                pilot.app.post_message(Key(key, key if len(key) == 1 else characters.get(key)))
            await press(pilot)
            consistent(pilot.app, size)

    drive(script, size)


def test_a_view_is_left_once() -> None:
    async def script(pilot: Pilot[Any]) -> None:
        await press(pilot, "e")
        page = pilot.app.screen
        page.dismiss()
        page.dismiss()
        await press(pilot)
        assert isinstance(pilot.app.screen, Fit)

    drive(script)


def test_in_a_real_terminal_it_paints_answers_and_leaves_it_as_it_was() -> None:
    assert state.save(State(question(), live=False)) == ""
    with Terminal([], (80, 24)) as terminal:
        terminal.wait_for("DOES NOT FIT")
        terminal.send("h")
        terminal.wait_for(f"needs {gib(fit(question(tuning='lora')).peak_bytes)} ")
        terminal.send("q")
        assert terminal.ended() == 0
        assert terminal.restored()
    kept, said = state.load()
    assert said == "" and kept.plan == question(tuning="lora")


def test_no_color_keeps_glyphs_and_words() -> None:
    state.save(State(question(), live=False))
    shown = {}
    for env in ({}, {"NO_COLOR": "1"}):
        with Terminal([], (80, 24), env) as terminal:
            terminal.wait_for("23.7 GiB usable", seconds=30)
            terminal.quiet(0.5)
            terminal.send("h")
            terminal.quiet(1.0)
            shown[bool(env)] = terminal.received
            terminal.send("q")
            assert terminal.ended() == 0
    assert hues(shown[False]) and not hues(shown[True])
    assert "DOES NOT FIT" in shown[True] and "█" in shown[True]


def hues(output: str) -> set[str]:
    """The colours in a terminal's output that are not grey."""
    found = re.findall(r"[34]8;2;(\d+);(\d+);(\d+)", output)
    return {";".join(rgb) for rgb in found if max(map(int, rgb)) - min(map(int, rgb)) > 8}
