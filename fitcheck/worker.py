"""Runs `python -m fitcheck.bench` as a process of its own and reads its JSON lines.

What imports torch never runs in the process of the command line or the screen: an out of memory
there kills neither, and no CUDA context is taken from the card that is judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from signal import SIGINT
from tempfile import TemporaryFile
from threading import Timer
from typing import Any

from fitcheck.errors import FitCheckError
from fitcheck.measured import Measurement
from fitcheck.plan import Plan
from fitcheck.report import Report

INSTALL = "pip install 'fitcheck-rlhf[bench]' (torch's CPU build is enough for a dry run)"
NEEDED = ("torch", "transformers", "peft")
PATIENCE = 60.0  # seconds that an interrupted measurement has to come to its next phase

Progress = Callable[[Mapping[str, Any]], None]


def dry_run(
    plan: Plan,
    options: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """The dry run's Report; `progress` is called with the name of each phase as it begins."""
    _check_installed("the dry run")

    def said(line: Mapping[str, Any]) -> None:
        if progress is not None:
            progress(line["phase"])

    return Report.from_json(_run("dryrun", plan, options, said, environment or {}), plan)


def measure(
    plan: Plan,
    options: Sequence[str] = (),
    progress: Callable[[str, int], None] | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Measurement:
    """The measurement of a plan on this machine; ctrl-C ends it with what was measured so far.

    progress: called with the name and the step of each phase as it begins; step 0 is loading.
    environment: variables of the process, such as PYTORCH_ALLOC_CONF. seconds: that it may take,
    as if somebody pressed ctrl-C then.
    """
    _check_installed("the measurement")

    def said(line: Mapping[str, Any]) -> None:
        if progress is not None:
            progress(line["phase"], line["step"])

    found = _run("measure", plan, options, said, environment or {}, seconds)
    return Measurement.from_json(found, plan)


def _check_installed(what: str) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise FitCheckError(f"{what} needs {' and '.join(missing)}", INSTALL)


def _run(
    verb: str,
    plan: Plan,
    options: Sequence[str],
    said: Progress,
    environment: Mapping[str, str],
    seconds: float | None = None,
) -> dict[str, Any]:
    command = [sys.executable, "-m", "fitcheck.bench", verb, *options]
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            encoding="utf-8",
            env={**os.environ, **environment},
            start_new_session=True,  # a terminal's ctrl-C is ours to pass on, once
        ) as child,
        _stopping(child, seconds),
    ):
        assert child.stdin and child.stdout
        try:
            json.dump(plan.to_json(), child.stdin)
            child.stdin.close()
            report = _answer(child.stdout, said)
        except KeyboardInterrupt:
            report = _interrupted(child, verb)
        except BaseException:
            child.kill()
            raise
        if report is not None:
            return report
        if child.wait() == -SIGINT:  # before it could listen
            raise FitCheckError("stopped", f"the {verb} had nothing to show yet")
        complaints.seek(0)
        last = complaints.read().strip().splitlines()[-1:] or ["no message"]
    raise FitCheckError(
        f"the {verb} ended without an answer: {last[0]}",
        f"run it alone to see more: {' '.join(command)} < plan.json",
    )


def _answer(lines: Iterable[str], said: Progress) -> dict[str, Any] | None:
    """The report among the lines; None where the process ended before it."""
    for line in lines:
        told = json.loads(line)
        if "error" in told:
            raise FitCheckError(told["error"], told["hint"])
        if "report" in told:
            return dict(told["report"])
        said(told)
    return None


def _interrupted(child: subprocess.Popen[str], verb: str) -> dict[str, Any] | None:
    """What a process that is asked to stop has to say; a second ctrl-C does not wait for it."""
    assert child.stdout
    stopped = FitCheckError("stopped", f"the {verb} had nothing to show yet")
    if verb != "measure" or os.name == "nt":
        child.kill()
        raise stopped
    try:
        with _stopping(child, 0):
            report = _answer(child.stdout, lambda line: None)
    except KeyboardInterrupt:
        child.kill()
        raise stopped from None
    if report is None:
        raise stopped
    return report


@contextmanager
def _stopping(child: subprocess.Popen[str], seconds: float | None) -> Iterator[None]:
    """Ask the process to come to an end after so many seconds, and kill it if it does not."""
    timers = []
    if seconds is not None:
        gentle = child.kill if os.name == "nt" else partial(child.send_signal, SIGINT)
        timers = [Timer(seconds, gentle), Timer(seconds + PATIENCE, child.kill)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
