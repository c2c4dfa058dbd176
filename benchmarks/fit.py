"""Time of the answer itself, inside one process: `make bench`.

    python benchmarks/fit.py [--runs 200]

Explanations (`why`) are formatted only when asked for, and nothing here asks for them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import suppress

METHODS = ["ppo", "grpo", "dpo", "reward", "sft", "inference"]


def milliseconds(call: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def row(name: str, times: list[float]) -> None:
    print(
        f"{name:40} {min(times):9.3f} ms {statistics.median(times):9.3f} ms   {len(times):4} runs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    print(f"{'':40} {'min':>12} {'median':>12}")

    # First calls read files and fill caches, so they are timed once; a screen then lives warm.
    row("import fitcheck", milliseconds(lambda: __import__("fitcheck"), 1))
    from fitcheck import FitCheckError, Plan, catalog, fit, resolve

    row("read every model of the catalog", milliseconds(catalog.models, 1))
    for method in METHODS:
        plan = resolve("llama-3.1-8b", method=method, gpu="rtx 4090")
        row(f"first fit: llama-3.1-8b, {method}", milliseconds(lambda plan=plan: fit(plan), 1))
        row(f"fit: llama-3.1-8b, {method}", milliseconds(lambda plan=plan: fit(plan), runs))

    gpu = catalog.find_gpu("rtx 4090")
    plans = []
    for model in catalog.models():
        with suppress(FitCheckError):  # more tokens than the model can read
            plans.append(Plan(model=model, method="ppo", gpu=gpu))

    def answers() -> int:
        covered = 0
        for plan in plans:
            with suppress(FitCheckError):  # an architecture that the estimate does not cover
                covered += bool(fit(plan).phases)
        return covered

    row("first fit of the catalog, ppo", milliseconds(answers, 1))
    again, covered = milliseconds(answers, 3), answers()
    row(f"fit: {covered} of {len(plans)} models, ppo", again)
    print(f"{'':40} {min(again) / covered:9.3f} ms a model")


if __name__ == "__main__":
    main()
