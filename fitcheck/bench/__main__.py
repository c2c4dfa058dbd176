"""python -m fitcheck.bench dryrun: a plan as JSON on standard input, JSON lines on standard output.

The command line and the screen run this as a process of its own: neither imports torch. Each line
is {"phase": name} while it runs, then {"timeline": ...} if asked for, and one {"report": ...} or
{"error": message, "hint": hint}.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

gc.disable()  # before torch is imported: searching its modules for cycles takes a fifth of the time

from fitcheck.answer import plan_from  # noqa: E402
from fitcheck.bench.dryrun import drawn, dry_run, snapshot, timeline  # noqa: E402
from fitcheck.errors import FitCheckError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fitcheck.bench")
    parser.add_argument("verb", choices=["dryrun"])
    for name in ("snapshot", "html", "svg"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--timeline", action="store_true")
    args = parser.parse_args()
    try:
        plan = plan_from(json.load(sys.stdin))
        report, traced = dry_run(plan, progress=lambda phase: say(phase=phase))
        if args.snapshot:
            snapshot(traced, args.snapshot)
        for path in filter(None, (args.html, args.svg)):
            path.write_text(drawn(traced, page=path == args.html), encoding="utf-8")
        if args.timeline:
            say(timeline=timeline(traced))
    except FitCheckError as fault:
        say(error=fault.message, hint=fault.hint)
        return 2
    except OSError as fault:
        say(error=f"cannot write {fault.filename}: {fault.strerror}", hint="choose another file")
        return 2
    say(report=report.to_json())
    return 0


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
