"""`fitcheck advise MODEL ...`: what makes it fit, how far each axis goes, what room is left.

fitcheck advise llama-3.1-8b --gpu 4090 --method ppo --tuning qlora
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fitcheck.advice import Ceiling, Fix, ceilings, fixes, frontier, room
from fitcheck.answer import DEFAULT_MODEL, check
from fitcheck.flags import add_plan_flags, plan_fields
from fitcheck.model import Model
from fitcheck.report import Report
from fitcheck.table import columns, whole_words
from fitcheck.text import WORDS, colourful, gib, headline, times, verdict_lines
from fitcheck.verifying import Check, possible, verified


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb, with `run` set."""
    summary = "what makes it fit, how far each axis goes, what room is left"
    parser = verbs.add_parser("advise", help=summary, description=summary)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a name, loosely")
    add_plan_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    text = "check by the dry run what makes it fit (on where torch is installed)"
    parser.add_argument("--dryrun", choices=("on", "off"), nargs="?", const="on", help=text)
    parser.set_defaults(run=run_advise)


def run_advise(args: argparse.Namespace) -> int:
    """Print the advice; 0 when the plan or one of its changes fits, else 1."""
    report = check(args.model, **plan_fields(args))
    found = advice(replace(report, advice=()))
    wanted = args.dryrun == "on" or (args.dryrun is None and possible())
    checks = verified(report, found.fixes) if wanted else iter(())
    verdicts = {fix.flags: fix.verdict for fix in found.fixes} | {"": report.verdict}
    if args.json:
        seen = list(checks)
        print(json.dumps(_json(found, seen), ensure_ascii=False, indent=1))
    else:
        width = min(columns(80), 120)
        for part in _parts(found, width):
            if part:
                print("\n".join(part), end="\n\n")
        seen = list(_told(checks, found, width))
    for one in seen:
        if one.report:
            verdicts[one.fix.flags if one.fix else ""] = one.report.verdict
    return 0 if set(verdicts.values()) - {"does-not-fit"} else 1


def _told(checks: Iterator[Check], found: Advice, width: int) -> Iterator[Check]:
    """The dry runs, each printed when it is there."""
    numbers = {fix.flags: number for number, fix in enumerate(found.fixes, 1)}
    for at, one in enumerate(checks):
        if not at:
            print("By the dry run (ctrl-C stops it)", flush=True)
        name = f"{numbers[one.fix.flags]:>2}" if one.fix and one.fix.flags in numbers else " +"
        what = one.fix.flags if one.fix else "as it is"
        if one.report is None:
            said = f"- {one.said}"
        else:
            glyph, words = WORDS[one.report.verdict]
            said = f"{glyph} {words.lower()}, needs {gib(one.report.peak_bytes)} GiB"
        lines = whole_words(f"{said}: {what}", width, f"{name if one.fix else '  '}  ", 6)
        print("\n".join(lines), flush=True)
        yield one


class Advice(NamedTuple):
    """All there is to say about one report."""

    report: Report
    fixes: list[Fix]
    room: list[Fix]
    frontier: list[Fix]
    ceilings: dict[str, Ceiling]


def advice(report: Report) -> Advice:
    """Search everything: some tenths of a second."""
    plan = report.plan
    limits = ceilings(plan)
    return Advice(report, fixes(plan, report), room(plan, limits), frontier(plan), limits)


def _json(found: Advice, checks: Sequence[Check]) -> dict[str, Any]:
    report = found.report
    dry = {one.fix.flags if one.fix else "": one.to_json() for one in checks}
    new = [one.fix for one in checks if one.fix and one.fix not in found.fixes]
    return {
        "plan": report.plan.to_json(),
        "verdict": report.verdict,
        "peak_bytes": report.peak_bytes,
        "usable_bytes": report.usable_bytes,
        "dry_run": dry.get(""),
        "advice": [fix.to_json() | {"dry_run": dry.get(fix.flags)} for fix in (*found.fixes, *new)],
        "room": [fix.to_json() for fix in found.room],
        "frontier": [fix.to_json() for fix in found.frontier],
        "ceilings": {name: _ceiling_json(ceiling) for name, ceiling in found.ceilings.items()},
    }


def _ceiling_json(ceiling: Ceiling) -> dict[str, Any]:
    return {
        "now": _said(ceiling.now),
        "largest": None if ceiling.value is None else _said(ceiling.value),
        "step": ceiling.step,
        "bound": ceiling.bound,
    }


def _said(value: Any) -> Any:
    return value.id if isinstance(value, Model) else value


def _parts(found: Advice, width: int) -> Iterator[list[str]]:
    """The page, paragraph by paragraph."""
    report = found.report
    yield [*textwrap.wrap(headline(report.plan), width), *verdict_lines(report, width, colourful())]
    if report.verdict == "fits":
        yield list(_lines("What may be turned up, each alone", found.room, width))
        yield list(_lines("What would save memory, each alone", found.fixes, width))
    else:
        enough = [fix for fix in found.fixes if fix.verdict != "does-not-fit"]
        if enough:
            yield ["What makes it fit, what costs you least first"]
        else:
            yield ["Nothing tried makes it fit; `fitcheck gpus --for` lists cards that would do"]
        for number, fix in enumerate(enough, 1):
            yield list(_block(number, fix, width))
        helping = [fix for fix in found.fixes if fix.verdict == "does-not-fit"]
        yield list(_lines("What helps, but is not enough alone", helping, width))
    yield list(_front(found.frontier, width))
    yield list(_limits(found.ceilings.values()))


def _block(number: int, fix: Fix, width: int) -> Iterator[str]:
    """One way to make it fit, in full."""
    yield from whole_words(fix.flags, width, f"{number:>2}  ", 6)
    verdict = {"fits": "fits", "tight": "is tight"}[fix.verdict]
    facts = f"saves {gib(fix.saves)} GiB, needs {gib(fix.peak_bytes)}: {verdict}; {fix.rank}"
    if fix.time is not None:
        facts += f"; time of a sample {times(fix.time)}"
    yield from whole_words(facts, width, " " * 4)
    yield from whole_words(fix.effect, width, " " * 4)
    yield from _command(fix.command, width)


def _command(command: str, width: int) -> Iterator[str]:
    """A command to copy, continued over lines as a shell reads it; a flag stays by its value."""
    glued = re.sub(r"(--\S+) ", "\\1\xa0", command)
    lines = [line.replace("\xa0", " ") for line in whole_words(glued, width - 10)]
    for number, line in enumerate(lines, 1):
        lead = "    $ " if number == 1 else "        "
        yield lead + line + (" \\" if number < len(lines) else "")


def _lines(title: str, found: Sequence[Fix], width: int) -> Iterator[str]:
    """A change a line: GiB, what changes, side effect."""
    if not found:
        return
    yield title
    flags = min(34, max(len(fix.flags) for fix in found))
    for fix in found:
        size = f"{'-' if fix.saves > 0 else '+'}{gib(abs(fix.saves))}"
        head = f"  {size:>7} GiB  {times(fix.time):>6}  {fix.flags:<{flags}}  "
        room = 25 + flags
        if len(head) > room:
            yield head.rstrip()
            head = " " * room
        yield from whole_words(fix.effect, width, head)


def _front(found: Sequence[Fix], width: int) -> Iterator[str]:
    """The frontier, a choice a line; nothing where none fits."""
    if len(found) < 2 or all(fix.verdict == "does-not-fit" for fix in found):
        return
    yield from textwrap.wrap("Choices that leave the result unchanged: GiB needed, time", width)
    for fix in found:
        size, glyph = gib(fix.peak_bytes), WORDS[fix.verdict][0]
        head = f"  {glyph} {size:>5} GiB  {times(fix.time):>6}  "
        yield from whole_words(fix.flags or "as it is", width, head)


def _limits(found: Iterable[Ceiling]) -> Iterator[str]:
    """How far each axis goes."""
    rows = [("field", "now", "largest", "stopped by")]
    for ceiling in found:
        largest = "none fits" if ceiling.value is None else _number(ceiling.value)
        rows.append((ceiling.field, _number(ceiling.now), largest, ceiling.bound))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield "How far each goes, all else as it is"
    for row in rows:
        yield "  " + "  ".join(map(str.ljust, row, widths)).rstrip()


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(_said(value).rpartition("/")[2])
