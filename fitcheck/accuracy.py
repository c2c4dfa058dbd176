"""How far off the answers are: predictions against every recorded measurement.

    python -m fitcheck.accuracy            # prints the table
    python -m fitcheck.accuracy --write    # and writes catalog/accuracy.json, which Reports state

A measurement file (catalog/measurements/*.json) is untrusted input: bounded and checked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.report import Error

LARGEST_FILE = 4 * 2**20
PERCENTILE = 95


@dataclass(frozen=True, slots=True)
class Comparison:
    """One recorded run: what was measured and what this rung predicts, torch's peak allocated."""

    run: str
    model: str
    method: str
    settings: str
    measured_bytes: int
    predicted_bytes: int

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, run) of every recorded run."""
    for path in sorted((catalog.ROOT / "measurements").glob("*.json")):
        if path.stat().st_size > LARGEST_FILE:
            raise FitCheckError(f"{path} is too large for a measurement", "4 MiB at most")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
            raise FitCheckError(f"{path} is not a measurement file", "see CONTRIBUTING.md")
        for run in content["runs"]:
            yield path.stem, run


def comparisons() -> list[Comparison]:
    """The estimate against every recorded run."""
    from fitcheck.answer import plan_from  # answer reads the stated error from here
    from fitcheck.fit import fit

    found = []
    for name, run in runs():
        plan = plan_from(run["plan"])
        settings = f"{plan.tuning}, {plan.precision}, {plan.micro_batch} x {plan.tokens}"
        measured = run["measured"]["allocated_bytes"]
        predicted = fit(plan).allocated_bytes
        found.append(
            Comparison(
                f"{name} {run['id']}", plan.model.name, plan.method, settings, measured, predicted
            )
        )
    return found


def summary(found: list[Comparison]) -> dict[str, Any]:
    """Per method: the 95th percentile of |error|, how many runs, and what they are."""
    result = {}
    for method in sorted({c.method for c in found}):
        errors = sorted(abs(c.error) for c in found if c.method == method)
        rank = min(len(errors) - 1, -(-len(errors) * PERCENTILE // 100) - 1)
        result[method] = {
            "relative": round(errors[rank], 4),
            "percentile": PERCENTILE,
            "n": len(errors),
            "basis": f"peak allocated of {len(errors)} published {method} runs on an A100",
        }
    return {"estimate": result}


@cache
def stated(method: str, rung: str) -> Error | None:
    """The error a Report states; None where no measurement of this method is recorded."""
    found = catalog.read("accuracy.json").get(rung, {}).get(method)
    return Error(**found) if found else None


def table(found: list[Comparison]) -> str:
    """The comparison as markdown."""
    lines = ["| run | model | settings | measured GB | estimate GB | error |", "|---|---|---|---|---|---|"]
    for c in found:
        measured, predicted = c.measured_bytes / 1e9, c.predicted_bytes / 1e9
        lines.append(
            f"| {c.run} | {c.model} | {c.method}, {c.settings} | {measured:.2f} | {predicted:.2f} "
            f"| {100 * c.error:+.1f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    found = comparisons()
    print(table(found))
    if "--write" in sys.argv[1:]:
        text = json.dumps(summary(found), indent=1) + "\n"
        (catalog.ROOT / "accuracy.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
