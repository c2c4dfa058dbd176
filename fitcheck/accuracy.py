"""How far off the answers are: predictions against every recorded measurement.

    python -m fitcheck.accuracy            # prints the table
    python -m fitcheck.accuracy --write    # and writes catalog/accuracy.json and the README's table

A measurement file (catalog/measurements/*.json) is untrusted input: bounded and checked. Its `runs`
are whole steps, its `losses` a loss head alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitcheck import files
from fitcheck.errors import FitCheckError

LARGEST_FILE = 4 * 2**20
PERCENTILE = 95
MARKS = ("<!-- accuracy -->", "<!-- /accuracy -->")  # around the table in the README


@dataclass(frozen=True, slots=True)
class Comparison:
    """One recorded run: torch's peak allocated, as measured and as the estimate predicts it."""

    run: str
    model: str
    method: str
    settings: str
    measured_bytes: int
    predicted_bytes: int | None
    missing: str = ""  # what the estimate does not cover, when it predicts nothing

    @property
    def error(self) -> float:
        """Relative: 0.01 is one percent too much. Only of a run that is covered."""
        assert self.predicted_bytes is not None
        return self.predicted_bytes / self.measured_bytes - 1


def rows(key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, row) of every recorded row under that key: `runs` or `losses`."""
    for path in sorted(Path(files.ROOT, "measurements").glob("*.json")):
        content = _content(path)
        found = content.get(key, [])
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise _odd(path, f"{key!r} is not a list of rows")
        for row in found:
            yield path.stem, row


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise _odd(path, "it is larger than 4 MiB")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise _odd(path, str(fault)) from fault
    if not isinstance(content, dict) or not content.keys() & {"runs", "losses"}:
        raise _odd(path, "no object with runs")
    return content


def _odd(path: Path, fault: str) -> FitCheckError:
    return FitCheckError(
        f"{path} is not a measurement file: {fault}", "compare it with its neighbours there"
    )


def comparisons() -> list[Comparison]:
    """The estimate against every recorded run."""
    return [_compared(f"{name} {run.get('id', '')}".strip(), run) for name, run in rows("runs")]


def _compared(name: str, run: dict[str, Any]) -> Comparison:
    from fitcheck.answer import plan_from
    from fitcheck.decoder import covered
    from fitcheck.fit import fit

    measured = run.get("measured")
    size = measured.get("allocated_bytes") if isinstance(measured, dict) else None
    if type(size) is not int or size <= 0:
        raise FitCheckError(f"run {name}: allocated_bytes cannot be {size!r}", "bytes, as measured")
    try:
        plan = plan_from(run.get("plan", {}))
    except FitCheckError as fault:
        raise FitCheckError(f"run {name}: {fault.message}", fault.hint) from fault
    missing = covered(plan.model, plan.tuning or "")
    predicted = None if missing else fit(plan).allocated_bytes
    settings = f"{plan.tuning}, {plan.precision}, {plan.micro_batch} x {plan.tokens}"
    return Comparison(name, plan.model.name, plan.method, settings, size, predicted, missing)


def summary(found: list[Comparison]) -> dict[str, Any]:
    """Per method: the 95th percentile of |error|, of how many runs, and what they are."""
    result = {}
    for method in sorted({c.method for c in found if not c.missing}):
        errors = sorted(abs(c.error) for c in found if c.method == method and not c.missing)
        rank = -(-len(errors) * PERCENTILE // 100) - 1
        result[method] = {
            "relative": round(errors[rank], 4),
            "percentile": PERCENTILE,
            "n": len(errors),
            "basis": f"peak allocated of {len(errors)} published {method} runs on an A100",
        }
    return {"estimate": result}


def table(found: list[Comparison]) -> str:
    """The comparison as markdown."""
    lines = [
        "| run | model | settings | measured GB | estimate GB | error |",
        "|---|---|---|---:|---:|---:|",
    ]
    for c in found:
        cells = [c.run, c.model, f"{c.method}, {c.settings}", f"{c.measured_bytes / 1e9:.2f}"]
        if c.predicted_bytes is None:
            cells += ["-", f"not covered: {c.missing}"]
        else:
            cells += [f"{c.predicted_bytes / 1e9:.2f}", f"{100 * c.error:+.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """The README with the table between its marks; unchanged where it has none."""
    before, start, rest = readme.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return f"{before}{start}\n{text}\n{end}{after}" if end else readme


def main() -> int:
    """Print the table; with --write, keep it where it is shown."""
    try:
        found = comparisons()
    except FitCheckError as fault:
        print(f"error: {fault.message}\n\nhint: {fault.hint}", file=sys.stderr)
        return 2
    print(table(found))
    if "--write" in sys.argv[1:]:
        text = json.dumps(summary(found), indent=1) + "\n"
        Path(files.ROOT, "accuracy.json").write_text(text, encoding="utf-8", newline="\n")
        readme = Path(files.ROOT).parent / "README.md"
        if readme.is_file():  # a checkout
            changed = with_table(readme.read_text(encoding="utf-8"), table(found))
            readme.write_text(changed, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
