"""The verbs that list the catalog: `fitcheck models`, `gpus`, `rewards` and `methods`.

    fitcheck models llama --params 1b..13b --aligned-by ppo
    fitcheck models --fits --gpu 4090 --method ppo --tuning lora
    fitcheck gpus --vendor amd --memory 16..24 --json

Tables fit the terminal; what no source confirms is marked in words. `--json` prints the full rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fitcheck import catalog
from fitcheck.catalog import Row
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.flags import add_plan_flags, plan_fields
from fitcheck.gpu import GPU
from fitcheck.model import VERIFIED
from fitcheck.names import card_names, card_sizes, squeeze
from fitcheck.rules import flag_of
from fitcheck.search import count, has_words, memory_range, params_range
from fitcheck.table import columns, print_table
from fitcheck.text import gib

if TYPE_CHECKING:
    from fitcheck.fitting import Fitting
    from fitcheck.report import Report

ALIGNED_BY = ("ppo", "dpo", "sft", "grpo")


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The four verbs; each sets `run`, a function of the parsed arguments that returns the exit."""
    models = _parser(subparsers, "models", "list the models of the catalog", list_models)
    models.add_argument("--family", help="only this family, such as qwen3")
    models.add_argument("--params", metavar="RANGE", help="parameters, such as 1b..13b or ..7b")
    models.add_argument(
        "--aligned-by", choices=ALIGNED_BY, help="a method in the recipe that aligned the model"
    )
    models.add_argument(
        "--update", action="store_true", help="write rows for these Hub ids (in a checkout)"
    )
    models.add_argument("--fits", action="store_true", help="only those that fit under a plan")
    add_plan_flags(models.add_argument_group("with --fits, the plan"))
    gpus = _parser(subparsers, "gpus", "list the GPUs of the catalog", list_gpus)
    gpus.add_argument("--vendor", choices=catalog.VENDORS)
    gpus.add_argument("--memory", metavar="RANGE", help="nominal GB, such as 16..24 or 80..")
    _add_for(gpus)
    _parser(subparsers, "rewards", "list the reward models of the catalog", list_rewards)
    _parser(subparsers, "methods", "list what FitCheck can judge", list_methods)


def _parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=summary, description=summary)
    if name != "methods":
        parser.add_argument("words", nargs="*", help="all of these words must appear")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the full rows")
    parser.set_defaults(run=run)
    return parser


OF_A_RUN = ("by", "samples", "tokens", "passes", "kwh", "price", "card")


def _add_for(gpus: argparse.ArgumentParser) -> None:
    """The cards a plan fits on: for which model, ranked by what, over how much data."""
    group = gpus.add_argument_group("which of them a plan fits on")
    group.add_argument("--for", dest="model", metavar="MODEL", help="only cards that it fits on")
    group.add_argument("--by", choices=("price", "time", "cost"), help="what ranks them (price)")
    for name, text in (
        ("samples", "of the run: prompts, pairs or examples, such as 10k (1,000)"),
        ("tokens", "of the run instead, such as 2m"),
        ("passes", "how often the data are read (1)"),
        ("kwh", "US dollars for a kWh"),
    ):
        group.add_argument(f"--{name}", metavar="N", help=text)
    for name, text in (
        ("price", "US dollars for an hour of a rented card, instead of the clouds' prices"),
        ("card", "US dollars for a card, instead of its street price"),
    ):
        text += "; once for each card, or as a bare number for all"
        group.add_argument(f"--{name}", action="append", metavar="CARD=USD", help=text)
    add_plan_flags(gpus.add_argument_group("with --for, the plan"))


def _refuse_plan(args: argparse.Namespace, more: Iterable[str], this: str, way_out: str) -> None:
    """FitCheckError for a flag that is part of a plan, where a list is asked for without one."""
    for name in (*plan_fields(args), *(name for name in more if getattr(args, name))):
        raise FitCheckError(
            f"{flag_of(name)} is part of a plan, and {this}", f"{way_out} to see only what fits"
        )


def matching_models(args: argparse.Namespace) -> list[Row]:
    """The index entries that the words, --family, --params and --aligned-by leave."""
    low, high = params_range(args.params or "0..")
    families = _families(args.family or "")
    return [
        entry
        for entry in catalog.model_entries()
        if low <= (entry.get("params") or 0) <= high
        and entry["family"] in families
        and (not args.aligned_by or _aligned_by(entry, args.aligned_by))
        and has_words(args.words, (entry["id"], entry["family"], entry["model_type"]))
    ]


def _families(text: str) -> set[str]:
    """The family of that name, or else those that have the text in their names."""
    families = {entry["family"] for entry in catalog.model_entries()}
    same = {family for family in families if squeeze(family) == squeeze(text)}
    return same or {family for family in families if squeeze(text) in squeeze(family)}


def _aligned_by(entry: Row, method: str) -> bool:
    recipe = entry.get("alignment_recipe") or ""
    return re.search(rf"\b{method}\b", recipe, re.IGNORECASE) is not None


def list_models(args: argparse.Namespace) -> int:
    """Print the models that match, with --fits only those that fit; 1 when there is none."""
    if args.update:
        from fitcheck.updating import update  # a contributor's, and none of an answer's

        print("\n".join(update(args.words, args.family)))
        return 0
    found, wishes = matching_models(args), plan_fields(args)
    if args.fits:
        return _list_fitting(found, wishes, args.json)
    _refuse_plan(args, (), "this lists models without one", "add --fits")
    if args.json:
        return _print_json([catalog.model_row(entry) for entry in found])

    def cells(entry: Row) -> tuple[str, ...]:
        recipe = entry.get("alignment_recipe") or ""
        if recipe and not entry.get("alignment_recipe_seen"):
            recipe = f"recalled: {recipe}"
        active = count(entry.get("params_active"))
        estimate = "none" if covered(catalog.model(entry)) else ""
        return entry["id"], _size(entry), active, entry.get("release_date") or "-", estimate, recipe

    titles = ("MODEL", "PARAMS", "ACTIVE", "RELEASED", "ESTIMATE", "ALIGNED BY")
    return print_table("model", titles, map(cells, found), "RELEASED")


def _size(entry: Row) -> str:
    size = count(entry.get("params"))
    return size if entry["status"] in VERIFIED else f"{size} {entry['status']}"


def _list_fitting(entries: list[Row], wishes: dict[str, Any], as_json: bool) -> int:
    """Print those that fit, the largest first, and how many of the others do not, and why."""
    from fitcheck.advice import pace  # most lists need no plan
    from fitcheck.fitting import fitting

    by_id = {entry["id"]: entry for entry in entries}
    found = fitting(map(catalog.model, entries), **wishes)
    told = textwrap.fill("; ".join(_told(found)), columns(200))
    if as_json:
        print(told, file=sys.stderr)
        rows = [catalog.model_row(by_id[report.plan.model.id]) for report in found.reports]
        answers = [
            {"verdict": r.verdict, "peak_bytes": r.peak_bytes, "seconds_a_sample": pace(r)}
            for r in found.reports
        ]
        return _print_json([row | answer for row, answer in zip(rows, answers, strict=True)])

    def cells(report: Report) -> tuple[str, ...]:
        entry = by_id[report.plan.model.id]
        released = entry.get("release_date") or "-"
        seconds = pace(report)
        time = "-" if seconds is None else f"{seconds:.3g}"
        return entry["id"], _size(entry), report.verdict, gib(report.peak_bytes), time, released

    if not found.reports:
        print(told, file=sys.stderr)
        return 1
    titles = ("MODEL", "PARAMS", "VERDICT", "GiB", "s/SAMPLE", "RELEASED")
    print_table("model", titles, map(cells, found.reports), "RELEASED")
    print(f"\n{told}")
    return 0


def _told(found: Fitting) -> Iterator[str]:
    """What the table leaves out, in words."""
    fit, judged = len(found.reports), len(found.reports) + found.too_large
    if fit:
        plan = found.reports[0].plan
        card = f"{plan.gpus} x {plan.gpu.name} ({gib(plan.memory.usable_bytes)} GiB usable)"
        yield f"{fit} of {_models(judged)} fit on {card}"
    else:
        yield f"none of {_models(judged)} fits"
    if found.not_covered:
        are = "is" if found.not_covered == 1 else "are"
        yield f"{_models(found.not_covered)} {are} not covered by the estimate"
    if found.too_short:
        yield f"{_models(found.too_short)} cannot read that many tokens"
    if found.refused:
        yield f"{_models(len(found.refused))} cannot run this plan ({found.refused[0].message})"
    if found.card:
        yield found.card


def _models(number: int) -> str:
    return "1 model" if number == 1 else f"{number} models"


def matching_gpus(args: argparse.Namespace) -> list[Row]:
    """The rows that the words, --vendor and --memory leave."""
    low, high = memory_range(args.memory or "0..")
    return [
        row
        for row in catalog.gpu_rows()
        if args.vendor in (None, row["vendor"])
        and any(low <= size <= high for size in card_sizes(row))
        and has_words(args.words, (*card_names(row), row["arch"], row["segment"]))
    ]


def list_gpus(args: argparse.Namespace) -> int:
    """Print the GPUs that match, with --for those that a plan fits on; 1 when none does."""
    found = matching_gpus(args)
    if args.model:
        from fitcheck.choosing import list_suitable  # a plain list has no costs

        return list_suitable(args, found)
    _refuse_plan(args, OF_A_RUN, "this lists cards without one", "add --for MODEL")

    def cells(row: Row) -> tuple[str, ...]:
        gpu = GPU.from_json(row)
        sizes = ", ".join(f"{size:g}" for size in card_sizes(row))
        memory = gib(gpu.total_bytes) if gpu.total_bytes else sizes
        tflops, speed = gpu.bf16_dense_tflops, gpu.bandwidth_gbs
        rates = (f"{rate:.0f}" if rate else "-" for rate in (speed, tflops))
        return gpu.short_name, memory, *rates, gpu.release or "-", gpu.doubt

    if args.json:
        return _print_json(found)
    titles = ("GPU", "GiB", "GB/s", "TFLOPS", "RELEASED", "UNVERIFIED")
    return print_table("GPU", titles, map(cells, found), "RELEASED")


def list_rewards(args: argparse.Namespace) -> int:
    """Print the reward models that match, each with its base; 1 when none does."""

    def cells(row: Row) -> tuple[str, ...]:
        base = row["base_model"].partition("/")[2]
        doubt = "" if row["status"] in ("exact", "instantiated") else f"size {row['status']}"
        return row["id"], count(row["params"]), base, row["kind"], doubt

    found = [
        row
        for row in catalog.rows("reward_models.json", "reward_models")
        if has_words(args.words, (row["id"], row["base_model"], row["kind"], row["model_type"]))
    ]
    if args.json:
        return _print_json(found)
    titles = ("REWARD MODEL", "PARAMS", "BASE", "KIND", "DOUBT")
    return print_table("reward model", titles, map(cells, found), "KIND")


def list_methods(args: argparse.Namespace) -> int:
    """Print what each method trains, keeps and reads."""
    if args.json:
        return _print_json(catalog.rows("methods.json", "methods"))
    for method in catalog.methods():
        trained = [role.role for role in method.roles if role.trained]
        frozen = [role.role for role in method.roles if not role.trained]
        models = f"trains: {', '.join(trained) or '-'}   frozen: {', '.join(frozen) or '-'}"
        paper = method.papers[0]
        print(f"{method.id}: {method.title}")
        source = f"{paper.title} (arXiv {paper.arxiv}, {paper.year})"
        for text in (method.description, models, f"one example: {method.data}", source):
            print(textwrap.fill(text, columns(200), initial_indent="  ", subsequent_indent="  "))
        print()
    return 0


def _print_json(found: Sequence[Any]) -> int:
    print(json.dumps(found, ensure_ascii=False, indent=1))
    return 0
