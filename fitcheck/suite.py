"""A fixed matrix of plans, each measured in a process of its own: `fitcheck bench --suite`.

Methods x tuning x precision x checkpointing x sizes, and cases at the edge: an allocator with just
enough, with less than it would reserve, with less than it needs; expandable segments. One file a
run; what is there already, of this card and these versions, is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fitcheck import archive, machine, worker
from fitcheck.errors import FitCheckError
from fitcheck.here import SHORT, SMALL, TINY, limited, plan_here
from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.text import gib
from fitcheck.three import estimated
from fitcheck.timings import slug

LEAST = 20.0  # seconds: no run is begun with less left
CORES = 4  # for each trace that is made while another case is measured
SIZES = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B", "meta-llama/Llama-3.1-8B")
SMALLER, LARGER = "HuggingFaceTB/SmolLM2-135M", ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B")
TOKENS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sft", "reward", "dpo"), {"sequence": 1024, "batch": 4, "micro_batch": 2}),
    "ppo": {"prompt": 256, "response": 64, "batch": 8, "micro_batch": 4, "epochs": 1},
    "grpo": {"prompt": 256, "response": 64, "batch": 8, "micro_batch": 4, "group": 4},
}
METHODS = tuple(TOKENS)
REGIMES: tuple[dict[str, Any], ...] = (  # the most telling first: time may end early
    {"tuning": "full", "precision": "bf16-mixed"},
    {"tuning": "lora", "precision": "bf16"},
    {"tuning": "full", "precision": "bf16", "checkpointing": False},
    {"tuning": "lora", "precision": "bf16-autocast", "checkpointing": False},
    {"tuning": "full", "precision": "bf16"},
)
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
# Bytes of the allocator by the dry run's peaks; what it says then is checked, whatever it is.
EDGES = ("enough", "between", "less")


class Case(NamedTuple):
    """One run: a model, the fields of its plan, an edge of EDGES or none."""

    model: str
    fields: dict[str, Any]
    edge: str = ""
    expandable: bool = False


def cases(on_card: bool) -> Iterator[Case]:
    """The matrix in the order in which it is run: all kinds first, since time may end early."""
    if not on_card:
        for method in METHODS:
            for regime in REGIMES[:2]:
                tokens = SHORT.get(method, {"sequence": 64})
                yield Case(TINY, {"method": method, **SMALL, **tokens, **regime})
        yield Case(TINY, {"method": "sft", **SMALL, "sequence": 64}, "less")
        return
    smallest, *middle, largest = SIZES
    yield from _grid(smallest, REGIMES[:3])
    yield from _grid(largest, REGIMES[1:3])
    for edge in ("", *EDGES):
        for method in ("sft", "ppo", "dpo"):
            for expandable in (False, True) if edge else (True,):
                yield Case(smallest, {"method": method, **TOKENS[method]}, edge, expandable)
    for model in middle:
        yield from _grid(model, REGIMES[:2])
    yield from _grid(smallest, REGIMES[3:])
    yield from _grid(SMALLER, REGIMES[:2])
    for model in LARGER:  # as far as they fit
        yield from _grid(model, REGIMES[1:2])


def _grid(model: str, regimes: Sequence[dict[str, Any]]) -> Iterator[Case]:
    for regime in regimes:
        for method in METHODS:
            yield Case(model, {"method": method, **TOKENS[method], **regime})


class Row(NamedTuple):
    """One run against what was said of it; errors are relative, None where nothing was measured."""

    name: str
    seconds: float | None
    traced_off: float | None
    estimate_off: float | None
    traced: str
    estimate: str
    happened: str

    @property
    def holds(self) -> bool:
        """The dry run within 2 % and its outcome right, the estimate within 5 %, no fit failed."""
        near = abs(self.traced_off or 0) <= 0.02 and abs(self.estimate_off or 0) <= 0.05
        right = self.traced == self.happened
        return near and right and not (self.estimate == "fits" and self.happened == "does-not-fit")


class Prepared(NamedTuple):
    """A case with what was said of it, ready to be measured."""

    path: Path
    plan: Plan
    environment: dict[str, str]
    options: list[str]
    estimate: Report | None
    traced: Report | None  # None: there already, or too large for this card


def prepare(case: Case, target: Path, found: machine.Machine) -> Prepared:
    """Trace a case, at an edge twice: to learn where it is, and what happens there.

    found: the machine before the suite began, whose other runs are not to be taken for others'.
    """
    plan, environment = plan_here(case.model, case.fields, found)
    if case.expandable:
        environment = environment | EXPANDABLE
    path = target / f"{_name(case, plan)}.json"
    estimate, options = estimated(plan), ["--steps=2"]
    too_large = estimate is not None and estimate.verdict == "does-not-fit"
    if path.exists() or too_large:  # the edges ask about failing, on a card of any size
        return Prepared(path, plan, environment, options, estimate, None)
    traced = worker.dry_run(plan, environment=environment)
    if case.edge:
        room = _room(case.edge, traced)
        options.append(f"--limit={room}")
        plan = limited(plan, room)
        estimate, traced = estimated(plan), worker.dry_run(plan, environment=environment)
    return Prepared(path, plan, environment, options, estimate, traced)


def measure_all(minutes: float, target: Path) -> Iterator[Row]:
    """Run what is not there yet, until the time is over or somebody stops it; each run's row."""
    until = time.monotonic() + 60 * minutes
    found = machine.detect()
    every = iter(cases(bool(found.accelerators)))
    tracers = max(1, (os.cpu_count() or 1) // CORES)
    ahead = tracers if tracers > 1 else 0  # with few cores a trace would slow the measurement
    with ThreadPoolExecutor(tracers) as pool:
        waiting: deque[Future[Prepared]] = deque()

        def submit(count: int) -> None:
            waiting.extend(
                pool.submit(prepare, case, target, found) for case in islice(every, count)
            )

        submit(1 + ahead)
        try:
            while waiting:
                next_one = waiting.popleft()
                if ahead:
                    submit(1)
                try:
                    ready = next_one.result()
                    left = until - time.monotonic()
                    if ready.traced is not None and (left < LEAST or not _measure(ready, left)):
                        return
                    if ready.path.exists():
                        yield row(ready.path)
                except FitCheckError as fault:  # of this case; the others are as good without it
                    yield Row(fault.message, None, None, None, "-", "-", "not run")
                if not ahead:
                    submit(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _measure(ready: Prepared, left: float) -> bool:
    """Measure and write; whether it came to its end."""
    measured = worker.measure(
        ready.plan, ready.options, environment=ready.environment, seconds=left
    )
    if measured.stopped:
        return False
    archive.write(archive.record(measured, ready.estimate, ready.traced), ready.path)
    return True


def _room(edge: str, traced: Report) -> int:
    """What the allocator shall have: a little more than it would reserve, less, too little."""
    allocated, reserved = traced.allocated_bytes, traced.reserved_bytes
    return {
        "enough": reserved + 2**21,
        "between": (allocated + reserved) // 2,
        "less": allocated * 98 // 100,
    }[edge]


def _name(case: Case, plan: Plan) -> str:
    """The same for the same run on the same card with the same versions."""
    made = [version(package) for package in ("torch", "transformers")]
    key = json.dumps([case, plan.gpu.id, made], sort_keys=True)
    words = [plan.method, plan.model.name, plan.tuning, plan.precision, case.edge]
    words.append("expandable" if case.expandable else "")
    text = "-".join([*filter(None, words), hashlib.sha256(key.encode()).hexdigest()[:8]])
    return slug(f"{plan.gpu.name}-{text}")


def row(path: Path) -> Row:
    """The run of a file against what was said of it."""
    run = archive.read(path).runs[0]
    measured = run.measured
    traced, estimate = run.predicted.get("dry-run"), run.predicted.get("estimate")
    size = measured.allocated_bytes

    def off(predicted: archive.Predicted | None) -> float | None:
        return predicted.allocated_bytes / size - 1 if predicted and size else None

    return Row(
        *(_words(run), measured.seconds, off(traced), off(estimate)),
        traced.verdict if traced else "-",
        estimate.verdict if estimate else "-",
        measured.outcome or "-",
    )


def _words(run: archive.RunRow) -> str:
    """What of a run tells it from the others."""
    plan, measured = run.plan, run.measured
    words = [plan["method"], plan["model"].split("/")[-1], plan["tuning"], plan["precision"]]
    if not plan["checkpointing"]:
        words.append("no checkpointing")
    if measured.expandable:
        words.append("expandable")
    if measured.limit_bytes:
        words.append(f"in {gib(measured.limit_bytes)} GiB")
    return " ".join(words)


def run(minutes: float, target: Path, as_json: bool) -> int:
    """Run the suite and print each row as it is known; 1 where a prediction did not hold."""
    rows = []
    if not as_json:
        print(f"{'run':<56}{'dry run':>9}{'estimate':>10}  outcome")
    for one in measure_all(minutes, target):
        rows.append(one)
        if not as_json:
            print(row_text(one), flush=True)
    if as_json:
        print(json.dumps([one._asdict() | {"holds": one.holds} for one in rows], indent=1))
    else:
        print(summary(rows, target))
    return 0 if all(one.holds for one in rows) else 1


def row_text(one: Row) -> str:
    """One line: how far off the two predictions were, and the outcome, said and real."""
    offs = [
        "-" if off is None else f"{100 * off:+.2f} %" for off in (one.traced_off, one.estimate_off)
    ]
    outcome = one.happened if one.traced == one.happened else f"{one.traced}, was {one.happened}"
    return f"{one.name[:55]:<56}{offs[0]:>9}{offs[1]:>10}  {outcome}" + (
        "" if one.holds else "  <- does not hold"
    )


def summary(rows: list[Row], target: Path) -> str:
    """What the whole proves."""
    known = [one for one in rows if one.traced_off is not None]
    near = sum(abs(one.traced_off or 0) <= 0.02 for one in known)
    close = sum(abs(one.estimate_off or 0) <= 0.05 for one in known)
    right = sum(one.traced == one.happened for one in rows)
    failed = sum(one.estimate == "fits" and one.happened == "does-not-fit" for one in rows)
    return (
        f"{len(rows)} runs in {target}: the dry run within 2 % on {near} of {len(known)}, its "
        f"outcome right on {right} of {len(rows)}; the estimate within 5 % on {close} of "
        f"{len(known)}; {failed} were said to fit and did not"
    )
