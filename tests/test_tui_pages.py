"""The views beside the home screen: each says what the report says, and leads back."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from screen import drive, press, question, settle, text
from textual.pilot import Pilot

from fitcheck import fit, machine, resolve
from fitcheck.advice import command
from fitcheck.cli import main
from fitcheck.gpu import GIB
from fitcheck.machine import Accelerator, Holder, Machine, Ram
from fitcheck.text import gib
from fitcheck.tui import process
from fitcheck.tui.app import FitCheckApp
from fitcheck.tui.compare import Compare, differing
from fitcheck.tui.dryrun import DryRun, differences
from fitcheck.tui.explain import entries, meaning
from fitcheck.tui.guide import keys_of
from fitcheck.tui.hardware import Hardware, Seen, sparkline
from fitcheck.tui.lines import plain
from fitcheck.tui.timeline import Timeline, columns, timeline_lines


def words(app: FitCheckApp) -> str:
    return " ".join(text(app).split())


@pytest.mark.parametrize("key", ["e", "c", "w", "x", "question_mark"])
@pytest.mark.parametrize("size", [(60, 20), (80, 24), (110, 30)], ids=["60", "80", "110"])
def test_every_view_opens_within_the_terminal_and_leads_back(
    key: str, size: tuple[int, int]
) -> None:
    async def script(pilot: Pilot[Any]) -> tuple[str, str, str]:
        await settle(pilot)
        home = text(pilot.app)
        await press(pilot, key)
        there = text(pilot.app)
        await press(pilot, "escape")
        return home, there, text(pilot.app)

    home, there, back = drive(script, size)
    assert home == back != there
    assert [len(row) for row in there.splitlines()] == [size[0]] * size[1]
    assert "esc back" in there and "q quit" in there


def test_explain_accounts_for_every_byte_at_the_peak() -> None:
    report = fit(question())
    found = entries(report)
    sums = {(entry.name, entry.role): entry.bytes for entry in found}
    for term in report.peak_phase.terms:
        assert term.bytes <= sums.get((term.name, term.role), 0)
    at_peak = [e.bytes for e in found if e.at == report.peak_phase.name or len(e.phases) > 1]
    assert sum(at_peak) >= report.peak_phase.peak.bytes * 0.99


def test_explain_shows_formula_and_source() -> None:
    async def script(pilot: Pilot[Any]) -> str:
        await press(pilot, "e")
        return words(pilot.app)

    shown = drive(script, (160, 60))
    for term in sorted(fit(question()).peak_phase.terms, key=lambda term: -term.bytes)[:3]:
        assert term.why in shown and f"{gib(term.bytes)} GiB" in shown
        what, source = meaning(term.name)
        assert what and f"{what} ({source})" in shown


def test_compare_shows_the_rows_that_differ_and_opens_a_pin() -> None:
    async def script(pilot: Pilot[Any]) -> None:
        await press(pilot, "c")
        assert "Nothing is pinned yet" in words(pilot.app)
        await press(pilot, "c", "escape", "h", "c")
        first, second = question(), question(tuning="lora")
        assert pilot.app.pins == [first]
        shown = text(pilot.app)
        names = differing([second, first])
        assert "tuning" in names and "batch" not in names
        for name in names:
            assert f"\n {name}" in shown
        assert "\n batch" not in shown
        (peaks,) = (row for row in shown.splitlines() if "peak GiB" in row)
        assert peaks.split()[2:] == [gib(fit(second).peak_bytes), gib(fit(first).peak_bytes)]
        await press(pilot, "l", "enter")
        assert not isinstance(pilot.app.screen, Compare)
        assert pilot.app.view.plan == first
        await press(pilot, "c", "l", "x")
        assert pilot.app.pins == []

    drive(script)


def test_help_names_every_key_of_every_view() -> None:
    async def script(pilot: Pilot[Any]) -> tuple[str, Any]:
        await press(pilot, "question_mark")
        page = pilot.app.screen.query_one("#page")
        return plain(page.lines), pilot.app.all_bindings()

    shown, everything = drive(script)
    assert len(everything) >= 6
    for _, bindings in everything:
        for keys, what in keys_of(bindings):
            assert re.search(rf"{re.escape(keys)}\s+{re.escape(what)}", shown)


def test_the_copied_command_reproduces_the_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def script(pilot: Pilot[Any]) -> Any:
        await settle(pilot)
        pilot.app.screen.action_go("response")
        await press(pilot, "l", "l", "y")
        assert pilot.app.clipboard == command(pilot.app.view.plan)
        return pilot.app.clipboard, pilot.app.view.report

    copied, report = drive(script)
    program, *arguments = shlex.split(copied)
    assert program == "fitcheck"
    assert main([*arguments, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["peak_bytes"] == report.peak_bytes
    assert printed["plan"] == report.plan.to_json()


@pytest.mark.parametrize("kind", ["json", "md", "svg"])
def test_export_writes_a_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textual.app.user_downloads_path", lambda: tmp_path, raising=False)
    monkeypatch.setattr("textual.driver.user_downloads_path", lambda: tmp_path, raising=False)
    monkeypatch.setenv("XDG_DOWNLOAD_DIR", str(tmp_path))

    async def script(pilot: Pilot[Any]) -> None:
        await press(pilot, "x", {"json": "j", "md": "m", "svg": "s"}[kind])
        for _ in range(100):
            await pilot.pause(0.02)
            if list(tmp_path.iterdir()):
                break
        await press(pilot)

    drive(script)
    (file,) = tmp_path.iterdir()
    assert file.suffix == f".{kind}"
    content = file.read_text(encoding="utf-8")
    peak = fit(question()).peak_bytes
    if kind == "json":
        assert json.loads(content)["peak_bytes"] == peak
    elif kind == "md":
        assert "DOES NOT FIT" in content and f"needs {gib(peak)} GiB" in content
    else:
        assert content.startswith("<svg") and "FitCheck" in content


def here(used: int) -> Machine:
    card = Accelerator(
        index=0,
        name="NVIDIA GeForce RTX 3060",
        vendor="nvidia",
        total_bytes=12 * GIB,
        reserved_bytes=GIB // 4,
        used_bytes=used,
        holders=(Holder(4321, used),),
    )
    return Machine(
        accelerators=(card,),
        ram=Ram(32 * GIB, 20 * GIB),
        cpus=8,
        system="Linux 6 x86_64",
        notes=(),
        raw=(),
    )


def test_hardware_shows_live_use_and_who_holds_memory() -> None:
    async def script(pilot: Pilot[Any]) -> str:
        await press(pilot, "w")
        page = pilot.app.screen
        assert isinstance(page, Hardware)
        for used in (0, 6, 9):
            page.post_message(Seen(here(used * GIB), [[("python", used * GIB)]]))
            await press(pilot)
        return text(pilot.app)

    shown = drive(script, (100, 30))
    assert "NVIDIA GeForce RTX 3060" in shown
    assert "2.8 of 12.0 GiB free" in shown  # 12 less 0.25 of the driver and 9 of others
    assert "9.0 GiB  python" in shown
    assert " ▄▆" in shown
    assert "20.0 of 32.0 GiB free" in shown


def test_sparkline_keeps_what_is_small_in_sight() -> None:
    assert sparkline([0.0, 0.01, 0.5, 1.0], 10) == " ▁▄█"
    assert sparkline([0.0, 0.5, 1.0], 2) == "▄█"


def test_this_machines_card_is_judged_when_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect", lambda: here(2 * GIB))

    async def script(pilot: Pilot[Any]) -> None:
        await pilot.app.workers.wait_for_complete()
        await settle(pilot)
        plan = pilot.app.view.plan
        assert plan.gpu.name == "NVIDIA GeForce RTX 3060"
        assert plan.memory.other_bytes == 2 * GIB and plan.ram == 20 * GIB
        assert "this machine's card" in text(pilot.app)
        await press(pilot, "g", *"4090", "enter")
        assert "PRETEND" in text(pilot.app) and pilot.app.view.plan.ram is None
        await press(pilot, "w", "t")
        assert pilot.app.view.plan.memory.other_bytes == 2 * GIB
        await press(pilot, "g", *"a100", "space", *"sxm", "enter")
        assert "A100" in pilot.app.view.plan.gpu.name
        assert "pretended" in words(pilot.app)
        await press(pilot, "+")
        assert pilot.app.view.plan.gpus == 2 and "2 × NVIDIA A100" in words(pilot.app)

    drive(script, app=FitCheckApp(watch_machine=True))


def test_timeline_keeps_the_peak_and_the_limit() -> None:
    samples = tuple((i, {"policy": GIB, "step": GIB * (i == 77)}) for i in range(200))
    line = Timeline(samples, ((0, "load"), (50, "rollout.decode")), GIB * 3 // 2, None)
    assert max(sum(roles.values()) for _, roles in columns(line, 20)) == 2 * GIB
    shown = plain(timeline_lines(line, 60, 14))
    assert "peak 2.0, the allocator may take 1.5 GiB" in shown
    assert "╌" in shown and "▞" in shown and "rollout" in shown
    assert all(len(row) <= 60 for row in shown.splitlines())


@pytest.mark.oracle
def test_dry_run_in_a_subprocess_shows_where_the_estimate_differs() -> None:
    async def script(pilot: Pilot[Any]) -> None:
        await press(pilot, "d")
        page = pilot.app.screen
        assert isinstance(page, DryRun)
        for _ in range(3000):
            await pilot.pause(0.02)
            if not page.running:
                break
        await press(pilot)
        assert page.fault is None
        report, timeline = pilot.app.traced[plan]
        assert report.source == "dry-run" and timeline.samples
        shown = words(pilot.app)
        assert "dry run" in shown and "PEAK ALLOCATED" in shown
        name, guess, seen = differences(fit(plan), report)[-1]
        assert f"{name} {guess / GIB:.2f} {seen / GIB:.2f}" in shown

    plan = resolve("smollm2-135m", gpu="rtx 4090", method="sft", sequence=128, batch=1)
    drive(script, (100, 50), app=FitCheckApp(plan))


def test_leaving_the_dry_run_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned: list[Any] = []
    spawn = process.asyncio.create_subprocess_exec

    async def endless(*command: Any, **settings: Any) -> Any:
        code = 'import time; print(\'{"phase": "load"}\', flush=True); time.sleep(600)'
        child = await spawn(command[0], "-c", code, **settings)
        spawned.append(child)
        return child

    monkeypatch.setattr(process.asyncio, "create_subprocess_exec", endless)
    monkeypatch.setattr(process, "find_spec", lambda name: object())

    async def script(pilot: Pilot[Any]) -> None:
        for leave in ("escape", "d", "q"):
            await press(pilot, "d")
            for _ in range(200):
                await pilot.pause(0.02)
                if "tracing load" in words(pilot.app):
                    break
            if leave == "q":
                return
            await press(pilot, leave)
            for _ in range(200):
                await pilot.pause(0.02)
                if spawned[-1].returncode is not None:
                    break
            assert spawned[-1].returncode is not None

    drive(script)
    assert len(spawned) == 3
    assert spawned[-1].returncode is not None  # with the app


def test_without_torch_the_dry_run_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "find_spec", lambda name: None)

    async def script(pilot: Pilot[Any]) -> str:
        await press(pilot, "d")
        return words(pilot.app)

    shown = drive(script)
    assert "needs torch" in shown and "fitcheck-rlhf[bench]" in shown
