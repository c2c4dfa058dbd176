"""The command line: `fitcheck check MODEL --gpu X ...`, and the listings.

Flags of `check` derive from the fields of Plan. Exit code 0: fits or tight; 1: does not fit; 2: error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fitcheck import __version__, listing
from fitcheck.answer import DEFAULT_MODEL, check, parse, resolve
from fitcheck.errors import FitCheckError
from fitcheck.plan import KNOBS, METHODS, Plan
from fitcheck.report import Report

EPILOG = """\
fitcheck check llama-3.1-8b --gpu 4090 --method ppo --tuning qlora
fitcheck check qwen3-8b --method inference --quant q4_k_m --context 32k
fitcheck models llama --params 1b..13b      fitcheck gpus 4090      fitcheck machine
"""


FILES = {
    "snapshot": "write PyTorch's memory snapshot (pytorch.org/memory_viz opens it)",
    "html": "write the memory timeline as a page",
    "svg": "write the memory timeline as a picture",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fitcheck",
        description="Will this training or inference run fit on this GPU?",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fitcheck {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    one = verbs.add_parser("check", help="does it fit, where is the peak, and why")
    add_plan_flags(one)
    shape = one.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one JSON object")
    shape.add_argument("--markdown", action="store_true", help="print markdown")
    shape.add_argument("--explain", action="store_true", help="print every term's formula")
    one.set_defaults(run=run_check)
    dry = verbs.add_parser("dryrun", help="trace the real step, without a GPU (needs torch)")
    add_plan_flags(dry)
    form = dry.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--compare", action="store_true", help="estimate against dry run, by phase")
    form.add_argument("--explain", action="store_true", help="print every term's makers")
    for name, text in FILES.items():
        dry.add_argument(f"--{name}", metavar="FILE", help=text)
    dry.set_defaults(run=run_dryrun, markdown=False)
    listing.add_parsers(verbs)
    verbs.add_parser("machine", help="what this computer has", add_help=False)
    return top


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL and a flag for each field of Plan."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a name, loosely")
    parser.add_argument("--method", choices=METHODS, default="ppo", help="what runs")
    parser.add_argument("--gpu", help="a pretended, empty card; default: this machine's")
    parser.add_argument("--gpus", help="how many cards (1)")
    parser.add_argument("--nodes", help="how many machines (1)")
    parser.add_argument("--ram", help="the host's memory, such as 64gib")
    for name, knob in KNOBS.items():
        flag = "--" + name.replace("_", "-")
        text = knob["doc"]
        if knob["choices"]:
            text += f": {', '.join(knob['choices'])}"
        if knob["kind"] == "flag":
            parser.add_argument(flag, nargs="?", const="on", metavar="on|off", help=text)
        else:
            parser.add_argument(flag, metavar="VALUE", help=text.replace("%", "%%"))


def plan_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given on the command line, as values."""
    fields: dict[str, Any] = {"method": args.method, "gpu": args.gpu}
    for name in ("gpus", "nodes", "ram", *KNOBS):
        text = getattr(args, name)
        if text is not None:
            fields[name] = parse(name, text)
    return fields


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
        return text.markdown(report)
    width = shutil.get_terminal_size((80, 24)).columns
    return text.report_text(report, min(width, 120), text.colourful(), args.explain)


def run_dryrun(args: argparse.Namespace) -> int:
    from fitcheck import text, worker  # only this verb needs them

    plan = resolve(args.model, **plan_fields(args))
    options = [f"--{name}={getattr(args, name)}" for name in FILES if getattr(args, name)]
    report = worker.dry_run(plan, options, _progress(plan))
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=1))
    elif args.compare:
        print(text.comparison(check(args.model, **plan_fields(args)), report))
    else:
        print(_shown(report, args))
    return 1 if report.verdict == "does-not-fit" else 0


def _progress(plan: Plan) -> Callable[[str], None] | None:
    """A line on standard error that says which phase is traced; nothing where nobody watches."""
    if not sys.stderr.isatty():
        return None

    def show(phase: str) -> None:
        sys.stderr.write(f"\r\x1b[Ktracing {plan.method} of {plan.model.name}: {phase}")
        sys.stderr.flush()

    return show


def _machine(argv: Sequence[str]) -> int:
    from fitcheck import machine  # its probes are not needed to judge a named card

    top = argparse.ArgumentParser(prog="fitcheck")
    machine.add_parser(top.add_subparsers())
    args = top.parse_args(argv)
    return int(args.run(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a FitCheckError becomes a message, a hint and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles, pipes
    words = list(sys.argv[1:] if argv is None else argv) or ["check"]
    try:
        if words[0] == "machine":
            return _machine(words)
        args = parser().parse_args(words)
        return int(args.run(args))
    except FitCheckError as fault:
        print(f"error: {fault.message}", file=sys.stderr)
        if fault.hint:
            print(f"\nhint: {fault.hint}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `fitcheck ... | head`
        sys.stderr.close()
        return 0
