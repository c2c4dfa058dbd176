"""Time of the answer itself, inside one process: `make bench`.

    python benchmarks/fit.py [--runs 200]

Explanations (`why`) are formatted only when asked for, and nothing here asks for them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

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

    # Reading the catalog is timed on its first call: afterwards it is in memory.
    row("import fitcheck", milliseconds(lambda: __import__("fitcheck"), 1))
    from fitcheck import catalog, fit
    from fitcheck.answer import resolve

    row("read every model of the catalog", milliseconds(catalog.models, 1))
    models = list(catalog.models())
    for method in METHODS:
        plan = resolve(model="llama-3.1-8b", method=method, gpu="rtx 4090")
        row(f"fit: llama-3.1-8b, {method}", milliseconds(lambda plan=plan: fit(plan), runs))

    plans = [resolve(model=model.id, method="ppo", gpu="rtx 4090") for model in models]
    whole = milliseconds(lambda: [fit(plan) for plan in plans], 3)
    row(f"fit: {len(plans)} models, ppo", whole)
    print(f"{'':40} {min(whole) / len(plans):9.3f} ms a model")


if __name__ == "__main__":
    main()
