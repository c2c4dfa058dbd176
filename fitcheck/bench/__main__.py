"""python -m fitcheck.bench VERB: a plan as JSON on standard input, JSON lines on standard output.

The command line and the screen run this as a process of its own: neither imports torch. Each line
is {"phase": name} while it runs ({"phase": name, "step": n} of a measurement), then {"timeline":
...} if asked for, and one {"report": ...} or {"error": message, "hint": hint}. An interrupt ends a
measurement at its next phase, and what was measured so far is its report.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
from pathlib import Path
from typing import Any

from fitcheck.answer import plan_from
from fitcheck.catalog import stated_error
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan

ANSWERS = sys.stdout
interrupts: list[int] = []  # signals to stop, heeded between phases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fitcheck.bench")
    verbs = parser.add_subparsers(dest="verb", required=True)
    dry = verbs.add_parser("dryrun")
    for name in ("snapshot", "html", "svg"):
        dry.add_argument(f"--{name}", type=Path)
    dry.add_argument("--timeline", action="store_true")
    dry.set_defaults(run=traced)
    one = verbs.add_parser("measure")
    one.add_argument("--steps", type=int, default=2)
    one.add_argument("--limit", type=int)
    one.add_argument("--weights")
    one.set_defaults(run=measured)
    verbs.add_parser("understand").set_defaults(run=None)
    args = parser.parse_args()
    sys.stdout = sys.stderr  # what libraries print is no answer
    if args.verb == "measure":  # before torch is imported, which takes seconds
        signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        if args.verb == "understand":
            say(row=understood(json.load(sys.stdin)))
            return 0
        report = args.run(plan_from(json.load(sys.stdin)), args)
    except FitCheckError as fault:
        say(error=fault.message, hint=fault.hint)
        return 2
    except OSError as fault:
        say(error=f"cannot write {fault.filename}: {fault.strerror}", hint="choose another file")
        return 2
    say(report=report)
    return 0


def understood(asked: dict[str, Any]) -> dict[str, Any]:
    """The row of a config whose architecture no formula covers."""
    from fitcheck.bench.unknown import row_of

    return row_of(asked["config"], asked["name"])


def traced(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """The dry run's report; its files are written."""
    gc.disable()  # before torch is imported: searching it for cycles takes a fifth of the time
    from fitcheck.bench.dryrun import drawn, dry_run, snapshot, timeline

    error = stated_error(plan.method, "dry-run")
    report, trace = dry_run(plan, error, lambda phase: say(phase=phase))
    if args.snapshot:
        snapshot(trace, args.snapshot)
    for path in filter(None, (args.html, args.svg)):
        path.write_text(drawn(trace, page=path == args.html), encoding="utf-8")
    if args.timeline:
        say(timeline=timeline(trace))
    return report.to_json()


def measured(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """The measurement's report."""
    from fitcheck.bench.measure import Wishes, measure

    said: list[Any] = []

    def watch(phase: str, step: int) -> None:
        if interrupts:
            raise KeyboardInterrupt
        if said != [phase, step]:
            said[:] = phase, step
            say(phase=phase, step=step)

    return measure(plan, Wishes(args.steps, args.limit, args.weights), watch).to_json()


def say(**line: Any) -> None:
    print(json.dumps(line), file=ANSWERS, flush=True)


if __name__ == "__main__":
    sys.exit(main())
