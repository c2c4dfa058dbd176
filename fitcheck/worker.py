"""Runs `python -m fitcheck.bench` as a process of its own and reads its JSON lines.

What imports torch never runs in the process of the command line or the screen: an out of memory
there kills neither, and no CUDA context is taken from the card that is judged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.report import Report

INSTALL = "pip install 'fitcheck-rlhf[bench]' (torch's CPU build is enough for a dry run)"
NEEDED = ("torch", "transformers", "peft")


def dry_run(
    plan: Plan, options: Sequence[str] = (), progress: Callable[[str], None] | None = None
) -> Report:
    """The dry run's Report; `progress` is called with the name of each phase as it begins."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise FitCheckError(f"the dry run needs {' and '.join(missing)}", INSTALL)
    return Report.from_json(_run("dryrun", plan, options, progress), plan)


def _run(
    verb: str, plan: Plan, options: Sequence[str], progress: Callable[[str], None] | None
) -> dict[str, Any]:
    command = [sys.executable, "-m", "fitcheck.bench", verb, *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        try:
            json.dump(plan.to_json(), child.stdin)
            child.stdin.close()
            for line in child.stdout:
                said = json.loads(line)
                if "error" in said:
                    raise FitCheckError(said["error"], said["hint"])
                if "report" in said:
                    return dict(said["report"])
                if progress is not None:
                    progress(said["phase"])
        except KeyboardInterrupt:
            child.terminate()
            raise FitCheckError("stopped", "nothing was written") from None
        last = child.stderr.read().strip().splitlines()[-1:] or ["no message"]
    raise FitCheckError(
        f"the {verb} ended without an answer: {last[0]}",
        f"run it alone to see more: {' '.join(command)} < plan.json",
    )
