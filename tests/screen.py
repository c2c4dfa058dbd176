"""Driving the screen in tests: an app on a pretended card, keys, and what is then to be seen.

def test_undo():
    async def script(pilot):
        await press(pilot, "l", "u")
        return text(pilot.app)
    drive(script)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from textual.pilot import Pilot

from fitcheck import resolve
from fitcheck.plan import Plan
from fitcheck.tui.app import FitCheckApp

T = TypeVar("T")
Script = Callable[[Pilot[Any]], Awaitable[T]]


def question(**wishes: Any) -> Plan:
    """The plan that the tests ask about: too large for its card, whose host is not known."""
    wishes = {"gpu": "rtx 4090", "tuning": "qlora"} | wishes
    return resolve("llama-3.1-8b", **wishes)


def drive(script: Script[T], size: tuple[int, int] = (80, 24), app: FitCheckApp | None = None) -> T:
    """What the script returns, run against an app of that size."""

    async def session() -> T:
        subject = app or FitCheckApp(question())
        async with subject.run_test(size=size, notifications=True) as pilot:
            await pilot.pause()
            return await script(pilot)

    return asyncio.run(session())


async def press(pilot: Pilot[Any], *keys: str) -> None:
    """Press keys, and wait until the screen shows what they did."""
    await pilot.press(*keys)
    for _ in range(2):  # a message's own messages come a turn later
        await pilot.pause()


async def settle(pilot: Pilot[Any], judged: bool = False) -> None:
    """Wait for the advice, which comes after the answer, and if asked for every row's verdict.

    Bounded: what never comes is a failure.
    """
    for _ in range(1500):
        await pilot.pause(0.02)
        busy = judged and any(not worker.is_finished for worker in pilot.app.workers)
        if not busy and not pilot.app.advice[1]:
            break
    else:
        raise AssertionError(f"never settled: {list(pilot.app.workers)}")
    await press(pilot)


def text(app: FitCheckApp) -> str:
    """The screen as text: all rows in full width. The one use of a private name of textual's."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)
