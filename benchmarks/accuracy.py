"""Estimate against dry run over every architecture that can be built: `make accuracy`.

    python -m benchmarks.accuracy [MODEL_TYPE ...]     writes docs/accuracy.md when nothing is named

Each architecture's smallest model of the catalog, cut to a few layers of every kind, runs every
method; regimes and sizes take turns. tests/test_agreement.py holds twelve models to it in CI.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers

from fitcheck import coefficients
from fitcheck.catalog import find_model, model_entries
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.model import VERIFIED
from tests.agreement import METHODS, REGIMES, Agreement, agreement, plan_of

TABLE = Path(__file__).parent.parent / "docs" / "accuracy.md"
LAYERS = 3
LARGEST = 3e9  # parameters of a model that is traced whole, since its layers are of several kinds
PAIRS = ("gpt_neo",)  # whose layers come in pairs: two of them


def smallest() -> dict[str, str]:
    """The id of the smallest verified model of each architecture."""
    rows = [row for row in model_entries() if row["status"] in VERIFIED and row["params"]]
    rows.sort(key=lambda row: -row["params"])
    return {row["model_type"]: row["id"] for row in rows}


TURNS = cycle(REGIMES)


def knobs_of(name: str) -> Iterator[dict[str, Any]]:
    """Every method, each under two regimes, which move on from one architecture to the next."""
    regimes, mixture = TURNS, find_model(name).moe is not None
    for turn in range(2):
        for method, sizes in METHODS.items():
            tuning, precision, checkpointing = next(regimes)
            if mixture and precision == "bf16-mixed":
                precision = "bf16"  # PyTorch traces experts in 16 bit only
            regime = {"tuning": tuning, "precision": precision, "checkpointing": checkpointing}
            yield {"method": method, **regime, **sizes[turn]}
    next(regimes)  # eleven of twelve: each method meets all


def compared(name: str) -> tuple[list[Agreement], dict[str, str]]:
    """What was compared, and why the rest was not: {message: first plan}."""
    found: list[Agreement] = []
    model = find_model(name)
    if why := covered(model):
        return found, {f"the estimate does not cover {why}": "any plan"}
    whole = coefficients.is_traced(model)
    if whole and model.params > LARGEST:
        return found, {f"{name} is too large to be traced whole here": "any plan"}
    refused: dict[str, str] = {}
    layers = 0 if whole else 2 if model.model_type in PAIRS else LAYERS
    for knobs in knobs_of(name):
        try:
            found.append(agreement(plan_of(name, layers, knobs)))
        except FitCheckError as fault:
            refused.setdefault(fault.message, f"{knobs['method']}, {knobs['tuning']}")
    return found, refused


def row(kind: str, name: str, found: list[Agreement]) -> str:
    worst = max(found, key=lambda both: abs(both.error))
    phase, off = max((both.worst for both in found), key=lambda item: abs(item[1]))
    typical = median(abs(both.error) for both in found)
    where = f"{worst.plan.method}, {worst.plan.tuning}, {worst.plan.precision}"
    return (
        f"| {kind} | {name.partition('/')[2]} | {len(found)} | {100 * typical:.2f} % "
        f"| {100 * worst.error:+.2f} % ({where}) | {100 * off:+.1f} % ({phase}) |"
    )


def document(rows: list[str], refused: list[str], every: list[Agreement]) -> str:
    errors = sorted(100 * abs(both.error) for both in every)
    most = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
    typical = median(errors)
    built = ", ".join(f"{module.__name__} {module.__version__}" for module in (transformers, peft))
    table = "\n".join(["| architecture | model | plans | median | worst peak | worst phase |",
                       "|---|---|---:|---:|---|---|", *rows])  # fmt: skip
    return f"""# Estimate against dry run

Written by `make accuracy`; do not edit. torch {torch.__version__.partition("+")[0]}, {built}.
Peak allocated bytes of the second step, relative to the dry run. Each architecture's smallest
model, cut to {LAYERS} layers: rounding weighs more in so small a model than in a whole one.

{len(every)} plans: median {typical:.2f} %, 95th percentile {most:.2f} %, worst {errors[-1]:.2f} %.

{table}

## Not compared

{chr(10).join(refused)}
"""


def main() -> int:
    warnings.simplefilter("ignore")
    rows, refused, every = [], [], []
    models = smallest()
    for kind in sys.argv[1:] or sorted(models):
        found, why = compared(models[kind])
        every += found
        if found:
            rows.append(row(kind, models[kind], found))
            print(rows[-1], flush=True)
        refused += [f"- {kind} ({plan}): {message}" for message, plan in why.items()]
    print("\n".join(refused))
    if not sys.argv[1:]:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(document(rows, refused, every), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
