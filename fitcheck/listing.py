"""The verbs that list the catalog: `fitcheck models`, `gpus`, `rewards` and `methods`.

    fitcheck models llama --params 1b..13b --aligned-by ppo
    fitcheck gpus --vendor amd --memory 16..24 --json

Tables fit the terminal; what no source confirms is marked in words. `--json` prints the full rows.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fitcheck import catalog
from fitcheck.catalog import Row
from fitcheck.errors import FitCheckError
from fitcheck.gpu import GPU
from fitcheck.model import VERIFIED
from fitcheck.names import card_names, card_sizes, squeeze
from fitcheck.text import gib

ALIGNED_BY = ("ppo", "dpo", "sft", "grpo")
Range = tuple[float, float]


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The four verbs; each sets `run`, a function of the parsed arguments that returns the exit."""
    models = _parser(subparsers, "models", "list the models of the catalog", list_models)
    models.add_argument("--family", help="only this family, such as qwen3")
    models.add_argument("--params", metavar="RANGE", help="parameters, such as 1b..13b or ..7b")
    models.add_argument(
        "--aligned-by", choices=ALIGNED_BY, help="a method in the recipe that aligned the model"
    )
    gpus = _parser(subparsers, "gpus", "list the GPUs of the catalog", list_gpus)
    gpus.add_argument("--vendor", choices=catalog.VENDORS)
    gpus.add_argument("--memory", metavar="RANGE", help="nominal GB, such as 16..24 or 80..")
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
        and _has_words(args.words, (entry["id"], entry["family"], entry["model_type"]))
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
    """Print the models that match; 1 when none does."""

    def cells(entry: Row) -> tuple[str, ...]:
        size = count(entry.get("params"))
        if entry["status"] not in VERIFIED:
            size += f" {entry['status']}"
        recipe = entry.get("alignment_recipe") or ""
        if recipe and not entry.get("alignment_recipe_seen"):
            recipe = f"recalled: {recipe}"
        active = count(entry.get("params_active"))
        return entry["id"], size, active, entry.get("release_date") or "-", recipe

    found = matching_models(args)
    if args.json:
        return _print_json([catalog.model_row(entry) for entry in found])
    titles = ("MODEL", "PARAMS", "ACTIVE", "RELEASED", "ALIGNED BY")
    return _print_table("model", titles, map(cells, found), "RELEASED")


def matching_gpus(args: argparse.Namespace) -> list[Row]:
    """The rows that the words, --vendor and --memory leave."""
    low, high = memory_range(args.memory or "0..")
    return [
        row
        for row in catalog.gpu_rows()
        if args.vendor in (None, row["vendor"])
        and any(low <= size <= high for size in card_sizes(row))
        and _has_words(args.words, (*card_names(row), row["arch"], row["segment"]))
    ]


def list_gpus(args: argparse.Namespace) -> int:
    """Print the GPUs that match; 1 when none does."""

    def cells(row: Row) -> tuple[str, ...]:
        gpu = GPU.from_json(row)
        sizes = ", ".join(f"{size:g}" for size in card_sizes(row))
        memory = gib(gpu.total_bytes) if gpu.total_bytes else sizes
        tflops, speed = gpu.bf16_dense_tflops, gpu.bandwidth_gbs
        rates = (f"{rate:.0f}" if rate else "-" for rate in (speed, tflops))
        name = re.sub(
            "^(NVIDIA GeForce|NVIDIA|AMD|Intel|Apple) | (Edition|Generation)$", "", gpu.name
        )
        return name, memory, *rates, gpu.release or "-", gpu.doubt

    found = matching_gpus(args)
    if args.json:
        return _print_json(found)
    titles = ("GPU", "GiB", "GB/s", "TFLOPS", "RELEASED", "UNVERIFIED")
    return _print_table("GPU", titles, map(cells, found), "RELEASED")


def list_rewards(args: argparse.Namespace) -> int:
    """Print the reward models that match, each with its base; 1 when none does."""

    def cells(row: Row) -> tuple[str, ...]:
        base = row["base_model"].partition("/")[2]
        doubt = "" if row["status"] in ("exact", "instantiated") else f"size {row['status']}"
        return row["id"], count(row["params"]), base, row["kind"], doubt

    found = [
        row
        for row in catalog.rows("reward_models.json", "reward_models")
        if _has_words(args.words, (row["id"], row["base_model"], row["kind"], row["model_type"]))
    ]
    if args.json:
        return _print_json(found)
    titles = ("REWARD MODEL", "PARAMS", "BASE", "KIND", "DOUBT")
    return _print_table("reward model", titles, map(cells, found), "KIND")


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
            print(textwrap.fill(text, _width(), initial_indent="  ", subsequent_indent="  "))
        print()
    return 0


def count(number: int | None) -> str:
    """Parameters as people say them: 8030261248 is 8.03B; None is a dash."""
    if not number:
        return "-"
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def params_range(text: str) -> Range:
    """`1b..13b`, `..7b`, `70b..`, or `8b`: within a tenth of it. Without a unit: billions."""
    return _range(text, {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "": 1e9}, 0.1, "1b..13b")


def memory_range(text: str) -> Range:
    """`16..24`, `..12`, `80..`, or `24` alone, in GB as on the box."""
    return _range(text, {"": 1.0, "g": 1.0, "gb": 1.0, "gib": 1.0}, 0.0, "16..24")


def _range(text: str, units: dict[str, float], slack: float, example: str) -> Range:
    ends: list[float | None] = []
    for end in text.lower().replace(" ", "").split(".."):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", end)
        if end and (not match or match[2] not in units):
            ends = []
            break
        ends.append(float(match[1]) * units[match[2]] if match else None)
    if len(ends) == 1 and ends[0] is not None:
        return ends[0] * (1 - slack), ends[0] * (1 + slack)
    if len(ends) != 2 or ends == [None, None]:
        raise FitCheckError(f"{text!r} is not a range", f"write it as {example}")
    low, high = ends
    return low or 0.0, float("inf") if high is None else high


def _has_words(words: Iterable[str], texts: Iterable[str]) -> bool:
    """Whether every word appears, separators aside and numbers whole: no 8b in 1.8b or 38b."""
    text = " ".join(texts).lower()
    return all(re.search(_pattern(word), text) for word in words)


def _pattern(word: str) -> str:
    parts = re.findall(r"[a-z]+|\d+", word.lower())
    whole = [rf"(?<!\d){part}(?!\d)" if part.isdigit() else part for part in parts]
    start = r"(?<!\.)" if word[:1].isdigit() else ""
    return start + "[ _./:-]*".join(whole)


def _print_json(found: Sequence[Any]) -> int:
    print(json.dumps(found, ensure_ascii=False, indent=1))
    return 0


def _print_table(
    noun: str, titles: Sequence[str], found: Iterable[tuple[str, ...]], spare: str
) -> int:
    """Left-aligned columns as wide as the terminal allows; 1 and a word to stderr when empty.

    Columns that say nothing are left out. Too wide a table loses its `spare` column, then the
    ends of its texts, and only then the middle of its names.
    """
    lines = [tuple(titles), *found]
    if len(lines) == 1:
        print(f"no {noun} of the catalog matches", file=sys.stderr)
        return 1
    columns = [column for column in zip(*lines, strict=True) if set(column[1:]) - {"", "-"}]
    if _excess(columns) > 0:
        columns = [column for column in columns if column[0] != spare]
    widths = [max(map(len, column)) for column in columns]
    for _ in range(_excess(columns)):
        texts = max(widths[1:], default=0)
        at = widths.index(texts, 1) if texts > _LEAST else widths.index(max(widths))
        widths[at] = max(1, widths[at] - 1)
    for line in zip(*columns, strict=True):
        cells = [_cut_inside(line[0], widths[0]), *map(_cut, line[1:], widths[1:])]
        print("  ".join(map(str.ljust, cells, widths)).rstrip())
    return 0


def _excess(columns: Sequence[tuple[str, ...]]) -> int:
    """How much wider than the terminal these columns are, two spaces between them."""
    return sum(max(map(len, column)) + 2 for column in columns) - 2 - _width()


_LEAST = 18  # columns that a text keeps while names can still be cut


def _cut_inside(name: str, width: int) -> str:
    """The start and the end of a name too long: names end in what tells them apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _width() -> int:
    """Columns of the terminal; plenty when there is none, for grep."""
    return shutil.get_terminal_size((200, 24)).columns
