"""The command line: `fitcheck check MODEL --gpu X ...`, and the listings.

Flags of `check` derive from the fields of Plan. Exit code 0: fits or tight; 1: does not; 2: error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fitcheck import __version__
from fitcheck.answer import DEFAULT_MODEL, advised, check, resolve
from fitcheck.errors import FitCheckError
from fitcheck.flags import add_plan_flags, plan_fields
from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.table import columns

EPILOG = """\
fitcheck    alone, on a terminal: the screen    fitcheck --serve: in a browser
fitcheck check llama-3.1-8b --gpu 4090 --method ppo --tuning qlora
fitcheck check qwen3-8b --method inference --quant q4_k_m --context 32k
fitcheck models llama --params 1b..13b    fitcheck gpus 4090    fitcheck machine
"""


FILES = {
    "snapshot": "write PyTorch's memory snapshot (pytorch.org/memory_viz opens it)",
    "html": "write the memory timeline as a page",
    "svg": "write the memory timeline as a picture",
}


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes told as all others are (a message, a hint), and no half flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        from difflib import get_close_matches  # only for mistakes

        from fitcheck.plan import KNOBS
        from fitcheck.rules import flag_of

        hint = f"`{self.prog} --help` shows what there is"
        for word in message.partition("unrecognized arguments: ")[2].split():
            if near := get_close_matches(word.partition("=")[0], map(flag_of, KNOBS), 1):
                hint = f"did you mean {near[0]}? `fitcheck check --help` lists all"
        raise FitCheckError(message.removeprefix("argument "), hint)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal; argparse asks shutil, whose import an answer need not pay."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=columns(80) - 2)


def parser(verb: str = "") -> argparse.ArgumentParser:
    """The command line of all verbs, or of one: its answer does not wait for the others' flags."""
    top: argparse.ArgumentParser = Parser(
        prog="fitcheck",
        description="Will this training or inference run fit on this GPU?",
        epilog=EPILOG,
        formatter_class=Help,
    )
    top.add_argument("--version", action="version", version=f"fitcheck {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, prog="fitcheck")
    if verb in ("check", ""):
        _add_check(verbs)
    if verb in ("advise", ""):
        from fitcheck import advising

        advising.add_parser(verbs)
    if verb in ("compare", ""):
        from fitcheck import comparing

        comparing.add_parser(verbs)
    if verb in ("dryrun", ""):
        _add_dryrun(verbs)
    if verb in ("bench", ""):
        from fitcheck import benching

        benching.add_parser(verbs)
    if verb in (*LISTINGS, ""):
        from fitcheck import listing

        listing.add_parsers(verbs)
    if verb in ("cost", ""):
        from fitcheck import costing

        costing.add_parser(verbs)
    if verb == "machine":
        from fitcheck import machine  # its probes are not needed to judge a named card

        machine.add_parser(verbs)
    elif not verb:
        verbs.add_parser("machine", help="what this computer has", add_help=False)
    return top


LISTINGS = ("models", "gpus", "rewards", "methods")
VERBS = ("check", "advise", "compare", "dryrun", "bench", "cost", *LISTINGS, "machine")


def _add_check(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "does it fit, where is the peak, and why"
    one = verbs.add_parser("check", help=summary, description=summary, formatter_class=Help)
    one.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a name, loosely")
    add_plan_flags(one)
    form = one.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print markdown")
    form.add_argument("--explain", action="store_true", help="print every term's formula")
    one.set_defaults(run=run_check)


def _add_dryrun(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "trace the real step, without a GPU (needs torch)"
    dry = verbs.add_parser("dryrun", help=summary, description=summary, formatter_class=Help)
    dry.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a name, loosely")
    add_plan_flags(dry)
    form = dry.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--compare", action="store_true", help="estimate against dry run, by phase")
    form.add_argument("--explain", action="store_true", help="print every term's makers")
    for name, text in FILES.items():
        dry.add_argument(f"--{name}", metavar="FILE", help=text)
    dry.set_defaults(run=run_dryrun, markdown=False)


def run_check(args: argparse.Namespace) -> int:
    report = check(args.model, **plan_fields(args))
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=1))
    else:
        print(_shown(report, args))
    return 1 if report.verdict == "does-not-fit" else 0


def _shown(report: Report, args: argparse.Namespace) -> str:
    from fitcheck import text  # only a person reads it

    if args.markdown:
        from fitcheck.markdown import markdown

        return markdown(report)
    return text.report_text(report, min(columns(80), 120), text.colourful(), args.explain)


def run_dryrun(args: argparse.Namespace) -> int:
    from fitcheck import worker  # only this verb needs them
    from fitcheck.progress import Bar

    plan = resolve(args.model, **plan_fields(args))
    options = [f"--{name}={getattr(args, name)}" for name in FILES if getattr(args, name)]
    with Bar(_phases(plan)) as bar:
        report = advised(worker.dry_run(plan, options, bar))
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=1))
    elif args.compare:
        from fitcheck.difference import comparison

        print(comparison(check(args.model, **plan_fields(args)), report))
    else:
        print(_shown(report, args))
    return 1 if report.verdict == "does-not-fit" else 0


def _phases(plan: Plan) -> list[str]:
    """The phases of a step, in order; none where only a dry run knows them."""
    from fitcheck.fit import fit

    try:
        return [phase.name for phase in fit(plan).phases]
    except FitCheckError:
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a FitCheckError becomes a message, a hint and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles, pipes
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = (_served(words) if words[0] == "--serve" else _run(words)) if words else _opened()
        sys.stdout.flush()  # here, where a closed pipe is still caught
        return code
    except FitCheckError as fault:
        print(f"error: {fault.message}", file=sys.stderr)
        if fault.hint:
            print(f"\nhint: {fault.hint}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `fitcheck ... | head`: what is left to print is nobody's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _opened() -> int:
    """`fitcheck` alone: the screen on a terminal, the default question's answer elsewhere."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        return _run(["check"])
    from fitcheck import tui  # a third of a second that only the screen needs

    return tui.run()


def _served(words: Sequence[str]) -> int:
    """`fitcheck --serve`: the screen in a browser, on this machine alone."""
    parser = Parser(prog="fitcheck", description="Serve the screen to this machine's browser.")
    parser.add_argument("--serve", action="store_true", required=True, help="serve on localhost")
    parser.add_argument("--port", type=int, default=8000, help="the port (8000)")
    parser.add_argument("--allow-measure", action="store_true", help="let it run steps on the GPU")
    args = parser.parse_args(words)
    if not 0 < args.port < 2**16:
        raise FitCheckError(f"--port cannot be {args.port}", "a number from 1 to 65535")
    from fitcheck.tui.serve import serve

    return serve(args.port, args.allow_measure)


def _run(words: Sequence[str]) -> int:
    args = parser(words[0] if words[0] in VERBS else "").parse_args(words)
    return int(args.run(args))
