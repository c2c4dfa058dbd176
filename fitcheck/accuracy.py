"""How far off the answers are: predictions against every recorded measurement.

    python -m fitcheck.accuracy            # prints the table
    python -m fitcheck.accuracy --write    # and writes catalog/accuracy.json and the README's table

The `runs` of the files in catalog/measurements are whole steps, `losses` a loss head alone. The
estimate is made anew of each run's plan; a dry run is what was recorded beside the measurement,
since it belongs to the versions that ran there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fitcheck import archive, files
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.timings import SOURCE

PERCENTILE = 95
MARKS = ("<!-- accuracy -->", "<!-- /accuracy -->")  # around the table in the README
RUNGS = ("estimate", "dry-run")
TITLES = {"estimate": "estimate", "dry-run": "dry run"}
FAILED = "does-not-fit"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One recorded run: torch's peak allocated, as measured and as each rung predicted it.

    A run that ended out of memory has no peak (measured_bytes None), but an outcome that can be
    held against the verdicts.
    """

    run: str
    model: str
    method: str
    settings: str
    measured_bytes: int | None
    predicted: dict[str, int] = field(default_factory=dict)  # bytes by rung
    missing: str = ""  # what the estimate does not cover, when it predicts nothing
    card: str = ""
    published: bool = True  # by others; else measured by `fitcheck bench`
    outcome: str | None = None
    verdicts: dict[str, str] = field(default_factory=dict)  # by rung

    def error(self, rung: str) -> float | None:
        """Relative: 0.01 is one percent too much. None where there is nothing to compare."""
        size = self.predicted.get(rung)
        return size / self.measured_bytes - 1 if size and self.measured_bytes else None


def contents() -> Iterator[tuple[str, archive.File]]:
    """(name, content) of every file of measurements on cards."""
    for path in sorted(Path(files.ROOT, "measurements").glob("*.json")):
        content = archive.read(path)
        if content.rung == "measured":  # what a CPU counted proves nothing about a card
            yield path.stem, content


def rows(key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, row) of every recorded row under that key: `runs` or `losses`."""
    for name, content in contents():
        for row in content.model_dump(exclude_unset=True).get(key, ()):
            yield name, row


def comparisons() -> list[Comparison]:
    """Every recorded run against what is said of it."""
    return [_compared(name, content, run) for name, content in contents() for run in content.runs]


def _compared(file: str, content: archive.File, run: archive.RunRow) -> Comparison:
    from fitcheck.advice.fix import judged
    from fitcheck.answer import plan_from
    from fitcheck.decoder import covered

    own = content.source == SOURCE
    name = file if own else f"{file} {run.id}"
    measured = run.measured
    if measured.allocated_bytes is None and measured.outcome is None:
        raise FitCheckError(f"run {name}: neither allocated_bytes nor an outcome", "add one")
    try:
        plan = plan_from(run.plan)
    except FitCheckError as fault:
        raise FitCheckError(f"run {name}: {fault.message}", fault.hint) from fault
    missing = covered(plan.model, plan.tuning or "")
    estimate = None if missing else judged(plan)
    predicted: dict[str, int] = {}
    verdicts: dict[str, str] = {}
    if traced := run.predicted.get("dry-run"):
        predicted["dry-run"], verdicts["dry-run"] = traced.allocated_bytes, traced.verdict
    if estimate is not None:
        predicted["estimate"] = estimate.allocated_bytes
        verdicts["estimate"] = estimate.card_verdict
    return Comparison(
        run=name,
        model=plan.model.name,
        method=plan.method,
        settings=_settings(plan),
        measured_bytes=measured.allocated_bytes,
        predicted=predicted,
        missing=missing,
        card=content.card or "",
        published=not own,
        outcome=measured.outcome,
        verdicts=verdicts,
    )


def _settings(plan: Plan) -> str:
    cards = f", {plan.sharding} on {plan.gpus} cards" if plan.gpus > 1 else ""
    return f"{plan.tuning}, {plan.precision}, {plan.micro_batch} x {plan.tokens}{cards}"


def summary(found: Iterable[Comparison]) -> dict[str, Any]:
    """Per rung and method: the 95th percentile of |error|, of how many runs, and what they are.

    A method without evidence is not there.
    """
    result: dict[str, Any] = {"estimate": {}}
    for rung in RUNGS:
        known = [(c, e) for c in found if (e := c.error(rung)) is not None]
        for method in sorted({c.method for c, _ in known}):
            errors = sorted(abs(e) for c, e in known if c.method == method)
            rank = -(-len(errors) * PERCENTILE // 100) - 1
            result.setdefault(rung, {})[method] = {
                "relative": round(errors[rank], 4),
                "percentile": PERCENTILE,
                "n": len(errors),
                "basis": _basis(method, [c for c, _ in known if c.method == method]),
            }
    return result


def _basis(method: str, found: list[Comparison]) -> str:
    """Which runs those are: "peak allocated of 11 published sft runs on an A100"."""
    whose = " published" if all(c.published for c in found) else ""
    names = sorted({c.card.removeprefix("NVIDIA ").partition("-")[0] for c in found})
    article = "an" if names[0][:1] in set("AEFHILMNORSX") else "a"  # as one says the letter
    return f"peak allocated of {len(found)}{whose} {method} runs on {article} {', '.join(names)}"


def wrong_outcomes(found: Iterable[Comparison]) -> list[str]:
    """Runs that were said to fit and failed, or whose outcome the dry run did not foresee."""
    wrong = []
    for c in found:
        if c.outcome is None:
            continue
        if c.outcome == FAILED and c.verdicts.get("estimate") == "fits":
            wrong.append(f"{c.run}: the estimate said it fits")
        if c.verdicts.get("dry-run", c.outcome) != c.outcome:
            wrong.append(f"{c.run}: {c.outcome}, the dry run said {c.verdicts['dry-run']}")
    return wrong


def table(found: list[Comparison]) -> str:
    """The comparison as markdown; a column for the dry run where one is recorded."""
    rungs = [
        rung for rung in RUNGS if rung == "estimate" or any(rung in c.predicted for c in found)
    ]
    head = ["run", "model", "settings", "measured GB"]
    for rung in rungs:
        head += [f"{TITLES[rung]} GB", "error"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for c in found:
        size = f"{c.measured_bytes / 1e9:.2f}" if c.measured_bytes else c.outcome or "-"
        cells = [c.run, c.model, f"{c.method}, {c.settings}", size]
        for rung in rungs:
            cells += _cells(c, rung)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(c: Comparison, rung: str) -> list[str]:
    size, off = c.predicted.get(rung), c.error(rung)
    if size is None:
        return ["-", f"not covered: {c.missing}" if rung == "estimate" else "-"]
    return [f"{size / 1e9:.2f}", f"{100 * off:+.1f} %" if off is not None else c.verdicts[rung]]


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
