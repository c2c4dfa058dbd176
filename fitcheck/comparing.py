"""`fitcheck compare`: models, methods, cards or whole plans side by side, a row each.

    fitcheck compare llama-3.1-8b qwen3-8b --gpu 4090 --tuning lora
    fitcheck compare llama-3.1-8b --method ppo,dpo,grpo,sft --gpu 4090,a100 --tuning qlora
    fitcheck compare llama-3.1-8b --pipeline --gpu a100 --tuning lora
    fitcheck compare --plan tuned.json --plan plain.json

Every flag of a plan takes several values, by comma; each combination is a row. What is the same
everywhere is said once.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from fitcheck.advice import pace
from fitcheck.answer import advised
from fitcheck.compared import Row, asked_for, differing, judged, read_plan, varied
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.flags import add_plan_flags
from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.report import Report
from fitcheck.table import columns, print_table
from fitcheck.text import gib


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb, with `run` set."""
    summary = "models, methods, cards or plans side by side"
    about = f"{summary}; every flag of a plan takes several values, by comma"
    parser = verbs.add_parser("compare", help=summary, description=about)
    parser.add_argument("model", nargs="*", help="names, loosely")
    parser.add_argument(
        "--pipeline", action="store_true", help="the stages of RLHF (SFT, reward model, PPO)"
    )
    parser.add_argument(
        "--plan", action="append", metavar="FILE", help="what `fitcheck check --json` printed"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list")
    form.add_argument("--markdown", action="store_true", help="print a markdown table")
    add_plan_flags(parser.add_argument_group("the plans"), several=True)
    parser.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    """Print a row for each plan; 0 when one fits (of a pipeline: all), else 1."""
    rows = judged(asked_for(args))
    rows += [Row({"plan": name}, advised(fit(read_plan(name)))) for name in args.plan or ()]
    reports = [row.report for row in rows if row.report]
    if not reports:
        raise FitCheckError(rows[0].refusal, "none of the plans can be judged")
    if args.json:
        print(json.dumps([_json(row) for row in rows], ensure_ascii=False, indent=1))
    else:
        _print(rows, args.pipeline, args.markdown)
    fitting = [report.verdict != "does-not-fit" for report in reports]
    return 0 if (all(fitting) if args.pipeline else any(fitting)) else 1


def _table(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
    """Titles, cells, and the fields that differ by default alone, which a note tells."""
    differ, several = differing(rows), varied(rows)
    files = any("plan" in row.asked for row in rows)
    shown = [name for name in differ if name in several or files]
    told = [name for name in differ if name not in shown]
    if files:
        shown.insert(0, "plan")
    titles = [name.upper().replace("_", " ") for name in shown]
    titles += ["FITS", "GiB", "SPARE", "s/SAMPLE", "PEAK", "TO FIT"]
    return titles, [_cells(row, shown) for row in rows], told


def _cells(row: Row, shown: Sequence[str]) -> tuple[str, ...]:
    report = row.report
    if report is None:
        asked = [_said(row.asked.get(name)) for name in shown]
        return (*asked, "-", "-", "-", "-", "-", row.refusal)
    values = [row.asked.get(n) if n == "plan" else getattr(report.plan, n) for n in shown]
    seconds = pace(report)
    return (
        *map(_said, values),
        WORDS[report.verdict],
        gib(report.peak_bytes),
        gib(report.spare_bytes),
        "-" if seconds is None else f"{seconds:.3g}",
        report.peak_phase.name,
        report.advice[0].flags if report.advice and report.advice[0].verdict == "fits" else "",
    )


WORDS = {"fits": "yes", "tight": "tight", "does-not-fit": "no"}


def _said(value: Any) -> str:
    """A field's value as a cell."""
    if isinstance(value, Model):
        return value.id.rpartition("/")[2]
    if isinstance(value, GPU):
        return value.short_name
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return "-" if value is None else str(value)


def _print(rows: Sequence[Row], pipeline: bool, as_markdown: bool) -> None:
    titles, cells, told = _table(rows)
    notes = list(_notes(rows, told, pipeline))
    if as_markdown:
        for line in (titles, ["---"] * len(titles), *cells):
            print(f"| {' | '.join(line)} |")
        print()
    else:
        print_table("plan", titles, cells, "SPARE")
        print()
    for note in notes:
        print(note if as_markdown else textwrap.fill(note, columns(200)))


def _notes(rows: Sequence[Row], told: Sequence[str], pipeline: bool) -> Iterator[str]:
    """What is the same, what differs by default, which stage of a pipeline decides."""
    reports = [row.report for row in rows if row.report]
    if pipeline:
        yield from _pipelines(rows)
    same = [
        f"{name} {_said(getattr(reports[0].plan, name))}"
        for name in ("model", "gpu", "method", "tuning")
        if name not in differing(rows) and getattr(reports[0].plan, name) is not None
    ]
    if same:
        yield f"The same for all: {', '.join(same)}"
    if told:
        yield f"Differs by default: {'; '.join(_by_default(name, rows) for name in told)}"
    yield "GiB needed at the peak; s/SAMPLE: seconds a prompt, pair or example; served: a token"


def _pipelines(rows: Sequence[Row]) -> Iterator[str]:
    """The worst stage of each pipeline: of rows that differ in their method alone."""
    others = [name for name in varied(rows) if name != "method"]
    groups: dict[str, list[Report]] = {}
    for row in rows:
        if row.report:
            whose = ", ".join(_said(row.asked[name]) for name in others)
            groups.setdefault(whose, []).append(row.report)
    for whose, reports in groups.items():
        worst = max(reports, key=lambda report: report.needed_bytes)
        fits = all(report.verdict != "does-not-fit" for report in reports)
        words = "fits" if fits else "does not fit"
        yield (
            f"The pipeline {words}{whose and f' ({whose})'}: its worst stage is "
            f"{worst.plan.method}, {gib(worst.peak_bytes)} GiB in "
            f"{worst.peak_phase.name} of {gib(worst.usable_bytes)} usable"
        )


def _by_default(name: str, rows: Sequence[Row]) -> str:
    """A field's values, each with the first plan that has it: `epochs 4 (ppo), 1 (grpo)`."""
    several = varied(rows)
    by = next((field for field in ("method", *several) if field in several), "method")
    values: dict[str, str] = {}
    for row in rows:
        if row.report and (value := getattr(row.report.plan, name)) is not None:
            values.setdefault(_said(value), _said(getattr(row.report.plan, by)))
    return f"{name} {', '.join(f'{value} ({whose})' for value, whose in values.items())}"


def _json(row: Row) -> dict[str, Any]:
    asked = {
        name: value.id if isinstance(value, (Model, GPU)) else value
        for name, value in row.asked.items()
    }
    if row.report is None:
        return {"asked": asked, "error": row.refusal}
    return {"asked": asked, "seconds_a_sample": pace(row.report), "report": row.report.to_json()}
