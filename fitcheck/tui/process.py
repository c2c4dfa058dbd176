"""A subprocess that prints JSON lines, beside a screen that stays alive: dry run, measurement.

    async for said in lines("dryrun", plan):
        said                  # {"phase": "update.policy.loss"}, ..., {"report": {...}}

The process ends with whoever reads it: a cancelled worker, a closed screen, the end of the app.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from textual.worker import Worker, WorkerCancelled, WorkerFailed

from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.worker import INSTALL, NEEDED

LARGEST_LINE = 64 * 2**20  # bytes; a report with its timeline takes some hundred KiB
PATIENCE = 3.0  # seconds between asking a process to end and ending it


def missing() -> str:
    """What has to be installed first, in words; empty when nothing has."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    return f"this needs {' and '.join(absent)}: {INSTALL}" if absent else ""


async def lines(
    verb: str,
    plan: Plan,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    started: Callable[[asyncio.subprocess.Process], None] | None = None,
) -> AsyncGenerator[dict[str, Any], None]:
    """What `python -m fitcheck.bench` says, line by line; FitCheckError for what it refuses.

    started: is given the process, to interrupt it.
    """
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fitcheck.bench", verb, *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=LARGEST_LINE,
        env={**os.environ, **(environment or {})},
        start_new_session=True,  # ctrl-C in the terminal is the screen's
    )
    if started is not None:
        started(child)
    assert child.stdin and child.stdout and child.stderr
    errors = asyncio.create_task(child.stderr.read())  # read as it comes: a full pipe would block
    try:
        child.stdin.write(json.dumps(plan.to_json()).encode())
        child.stdin.close()
        answered = False
        async for line in child.stdout:
            said = json.loads(line)
            if "error" in said:
                raise FitCheckError(said["error"], said["hint"])
            answered = answered or "report" in said
            yield said
        if not answered:
            last = (await errors).decode(errors="replace").strip().splitlines()[-1:]
            raise FitCheckError(
                f"the {verb} ended without an answer: {''.join(last) or 'no message'}",
                f"`fitcheck {verb}` on the command line shows more",
            )
    finally:
        await _end(child)
        errors.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await errors


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ask it to end, then make it."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
        try:
            await asyncio.wait_for(child.wait(), PATIENCE)
        except TimeoutError:
            child.kill()
            await child.wait()


async def settled(workers: Iterable[Worker[Any]]) -> None:
    """Cancel workers and wait until their processes have ended: before their loop does."""
    for worker in workers:
        worker.cancel()
        with contextlib.suppress(WorkerFailed, WorkerCancelled):
            await worker.wait()
