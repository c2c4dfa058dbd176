"""The verb `fitcheck bench`: a plan's real step on this machine, against what was predicted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fitcheck.answer import parse
from fitcheck.errors import FitCheckError
from fitcheck.flags import add_plan_flags, plan_fields
from fitcheck.table import columns

if TYPE_CHECKING:
    from fitcheck.here import Here
    from fitcheck.largest import Search
    from fitcheck.measured import Measurement

SHOWN_FIXES = 5


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb; it sets `run`, a function of the parsed arguments that returns the exit code."""
    summary = "run the real step here and measure it (needs torch)"
    one = verbs.add_parser("bench", help=summary, description=summary)
    one.add_argument("model", nargs="?", help="a name, loosely; default: the largest that fits")
    kind = one.add_argument_group("what to run").add_mutually_exclusive_group()
    kind.add_argument("--until-oom", action="store_true", help="search the largest micro-batch")
    kind.add_argument("--suite", action="store_true", help="run a fixed matrix of plans")
    kind.add_argument(
        "--export", nargs="?", const="measurements.zip", metavar="ZIP", help="bundle what was saved"
    )
    more = one.add_argument_group("how")
    more.add_argument("--steps", type=int, default=2, help="to measure, after one to warm up (2)")
    more.add_argument("--minutes", type=float, default=10, help="that the suite may take (10)")
    more.add_argument("--limit", metavar="SIZE", help="let the allocator have no more: 20gib")
    more.add_argument("--weights", metavar="ID", help="a Hub id or a folder; default: random")
    more.add_argument("--save", action="store_true", help="keep the measurement as a file")
    more.add_argument("--to", type=Path, metavar="FOLDER", help="where to keep it")
    form = one.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--explain", action="store_true", help="print all that was read of memory")
    add_plan_flags(one.add_argument_group("the plan"))
    one.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """0: it ran, if only after flushes; 1: it ran out of memory, or a prediction did not hold."""
    if args.steps < 1:
        raise FitCheckError(f"--steps cannot be {args.steps}", "a whole number, 2 or more is usual")
    if args.export:
        from fitcheck import archive

        count = archive.export(Path(args.export), args.to)
        print(f"{count} measurements in {args.export}; nothing in them says whose computer it was")
        return 0
    if args.suite:
        from fitcheck import archive, suite

        target = args.to or (archive.folder() if args.save else archive.own_folder() / "suite")
        return suite.run(args.minutes, target, args.json)
    from fitcheck.here import limited, plan_here

    fields = plan_fields(args)
    if args.until_oom:
        fields = {"batch": 1, **fields} if fields.get("method") != "grpo" else fields
    here = plan_here(args.model, fields)
    options = [f"--steps={args.steps}"]
    if args.weights:
        options.append(f"--weights={args.weights}")
    if args.limit:
        limit = parse("ram", args.limit)
        options.append(f"--limit={limit}")
        here = here._replace(plan=limited(here.plan, limit))
    return _search(here, options, args) if args.until_oom else _one(here, options, args)


def _one(here: Here, options: list[str], args: argparse.Namespace) -> int:
    from fitcheck import text
    from fitcheck.advice import fixes
    from fitcheck.measured_text import measured_text
    from fitcheck.three import three

    plan = here.plan
    estimate, traced, measured = three(here, options, args.steps)
    if args.save:
        from fitcheck import archive  # pydantic: only who keeps it pays for it

        content = archive.record(measured, estimate, traced)
        measured = measured.noting(f"saved as {archive.save(content, args.to)}")
    advice = fixes(plan, estimate, SHOWN_FIXES) if measured.oom and estimate else []
    if args.json:
        values = measured.to_json() | {"advice": [fix.to_json() for fix in advice]}
        values["predicted"] = {
            rung: report.to_json()
            for rung, report in (("estimate", estimate), ("dry-run", traced))
            if report is not None
        }
        print(json.dumps(values, ensure_ascii=False, indent=1))
    else:
        width = min(columns(80), 120)
        print(measured_text(measured, estimate, traced, width, text.colourful(), args.explain))
        for fix in advice:
            print(f"Fix      {fix.flags}: {text.gib(fix.peak_bytes)} GiB, {fix.verdict}")
    return 1 if measured.oom else 0


def _search(here: Here, options: list[str], args: argparse.Namespace) -> int:
    from fitcheck import text
    from fitcheck.largest import until_oom

    def tell(size: int, tried: Measurement) -> None:
        what = f"runs out of memory in {tried.oom.phase}" if tried.oom else "fits"
        peak = text.gib(tried.report.reserved_bytes)
        print(f"micro-batch {size}: {what}, {peak} GiB reserved", file=sys.stderr)

    found = until_oom(here.plan, options, here.environment, tell)
    if args.json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=1))
    else:
        print(searched_text(found))
    return 0 if found.largest else 1


def searched_text(found: Search) -> str:
    """What the search came to, and what had been said."""
    from fitcheck import text

    said = ", ".join(f"{size} {verdict}" for size, verdict in found.traced.items())
    return "\n".join(
        [
            text.headline(found.plan),
            f"The largest micro-batch that really fits: {found.largest}",
            f"Estimate {found.estimated}; dry run: {said}; {len(found.tried)} runs",
        ]
    )
