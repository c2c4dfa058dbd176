"""Rows of a comparison: every combination of what was asked, each judged as `check` judges it.

rows = judged([{"model": "qwen3-8b", "tuning": "lora"}, {"model": "qwen3-8b", "tuning": "qlora"}])
differing(rows)                                               # ["tuning"]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from fitcheck import catalog
from fitcheck.answer import DEFAULT_MODEL, check, find_model, plan_from
from fitcheck.errors import FitCheckError
from fitcheck.flags import HARDWARE, value_of
from fitcheck.plan import EXAMPLES, KNOBS, METHODS, ROLLOUT, Plan, used_fields
from fitcheck.report import Report
from fitcheck.rules import choice_error, flag_of

PIPELINE = ("sft", "reward", "ppo")  # the stages of RLHF (InstructGPT, arXiv 2203.02155)
MOST = 100  # rows: more is a slip of the finger
LARGEST = 2**20  # bytes of a plan's file; what `check --json` prints is a tenth of it


class Row(NamedTuple):
    """One combination: what was asked, and its report or why there is none."""

    asked: dict[str, Any]
    report: Report | None
    refusal: str = ""


def asked_for(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination of the values that were given, as wishes of `fitcheck.check`."""
    axes: dict[str, list[Any]] = {}
    for name in ("method", *HARDWARE, *KNOBS):
        text = getattr(args, name)
        if text is not None:
            whole = name in KNOBS and KNOBS[name]["kind"] == "list"
            parts = [text] if whole else text.split(",")
            axes[name] = [_value(name, part.strip()) for part in parts]
    if args.pipeline:
        if "method" in axes:
            raise FitCheckError(
                "--pipeline has its own methods", f"leave --method out: {', '.join(PIPELINE)}"
            )
        axes["method"] = list(PIPELINE)
    if args.model or not args.plan:
        models = [find_model(name) for name in args.model or (DEFAULT_MODEL,)]
        axes = {"model": models, **axes}
    elif axes:
        raise FitCheckError(
            f"{flag_of(min(axes))} changes no plan that a file holds", "name a model as well"
        )
    found = [dict(zip(axes, values, strict=True)) for values in product(*axes.values()) if axes]
    if len(found) > MOST:
        raise FitCheckError(f"{len(found)} combinations are too many", f"{MOST} at most")
    return found


def _value(name: str, text: str) -> Any:
    """A value that exists: a slip of the finger is no row of the table."""
    if name == "gpu":
        return catalog.find_gpu(text)
    choices = METHODS if name == "method" else KNOBS.get(name, {}).get("choices", ())
    if choices and text not in choices and (name == "method" or KNOBS[name]["kind"] == "choice"):
        raise choice_error(name, text, choices)
    return value_of(name, text)


def judged(found: Sequence[dict[str, Any]]) -> list[Row]:
    """The report of each combination; of those the rules refuse, why.

    What a plan has no use for is left out of it, as long as another one uses it. Where methods
    meet that write text and that read examples, an example is a prompt with its response.
    """
    methods = {asked.get("method", METHODS[0]) for asked in found}
    uses = [used_fields(asked.get("method", METHODS[0]), asked) for asked in found]
    anywhere = frozenset[str]().union(*uses)
    rows = []
    for asked, used in zip(found, uses, strict=True):
        unused = anywhere - used
        wishes = {name: value for name, value in asked.items() if name not in unused}
        if methods & set(ROLLOUT) and asked.get("method") in EXAMPLES:
            wishes.setdefault("sequence", asked.get("prompt", 512) + asked.get("response", 512))
        try:
            rows.append(Row(asked, check(**wishes)))
        except FitCheckError as fault:
            if len(found) == 1:
                raise
            rows.append(Row(asked, None, fault.message))
    return rows


def read_plan(name: str) -> Plan:
    """The plan in a file, alone or in a report; untrusted."""
    path = Path(name)
    try:
        if path.stat().st_size > LARGEST:
            raise FitCheckError(f"{name} is too large for a plan", f"{LARGEST:,} bytes at most")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise FitCheckError(f"cannot read {name}: {fault.strerror}", "name a file") from fault
    except (ValueError, RecursionError) as fault:
        hint = "write one with `fitcheck check MODEL ... --json > FILE`"
        raise FitCheckError(f"{name} is not JSON: {fault}", hint) from fault
    inner = content.get("plan") if isinstance(content, dict) else None
    return plan_from(inner if isinstance(inner, dict) else content)


FIELDS = ("model", "gpu", "method", *HARDWARE[1:], *KNOBS)


def differing(rows: Sequence[Row]) -> list[str]:
    """The fields in which the plans differ, where they use them, in the order of Plan."""
    plans = [row.report.plan for row in rows if row.report]
    found = [name for name in FIELDS if _several([getattr(plan, name) for plan in plans])]
    asked = varied(rows)
    return [name for name in FIELDS if name in asked or name in found]


def varied(rows: Sequence[Row]) -> list[str]:
    """The fields that were asked for with several values."""
    asked = {name for row in rows for name in row.asked}
    return [
        name for name in FIELDS if name in asked and _several([r.asked.get(name) for r in rows])
    ]


def _several(values: Sequence[Any]) -> bool:
    """Whether there are at least two values; None is none."""
    known = [value for value in values if value is not None]
    return any(value != known[0] for value in known)
