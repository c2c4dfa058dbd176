"""What a user of the screen waits for, in a real pseudo-terminal: `make bench`.

    python benchmarks/screen.py [--runs 9]

First paint: from the start of the process until the verdict is on the terminal; to be compared with
Python's own start. Key: from a key until the new plan's answer is on the terminal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from terminal import Terminal

from fitcheck import resolve
from fitcheck.plan import Plan
from fitcheck.text import gib
from fitcheck.tui import state
from fitcheck.tui.knobs import fields_of, notch
from fitcheck.tui.state import State
from fitcheck.tui.view import answer

SIZES = [(80, 24), (160, 45)]
PAINT, KEY = 0.700, 0.060  # seconds: the targets, on an idle machine


def measure(size: tuple[int, int], plan: Plan) -> tuple[float, float, list[float]]:
    """Wall and processor seconds to the first paint; seconds from each key to its answer.

    Every key asks for a plan that was not asked for before: half the prompt, again and again.
    """
    fields = fields_of(plan)
    with Terminal([], size) as terminal:
        paint = terminal.wait_for("DOES NOT FIT|FITS|TIGHT")
        processor = terminal.cpu_seconds()
        terminal.quiet(1.0)
        terminal.send("j" * (fields.index("prompt") - fields.index("tuning")))
        terminal.quiet(1.0)
        waits = []
        for _ in range(6):
            half = notch(plan, "prompt", -1)
            assert half is not None
            plan = half
            terminal.received = ""
            sent = terminal.send("h")
            waits.append(terminal.wait_for(f"needs {gib(answer(plan).peak_bytes)} ") - sent)
            terminal.quiet(0.5)
        terminal.send("q")
        terminal.ended()
    return paint, processor, waits


def row(name: str, times: list[float], target: float) -> None:
    least, median = min(times) * 1e3, statistics.median(times) * 1e3
    said = "" if least < target * 1e3 else f"   slower than {target * 1e3:.0f} ms"
    print(f"{name:40} {least:5.0f} ms {median:5.0f} ms{said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_CONFIG_HOME"] = os.environ["HOME"] = home
        plan = resolve("llama-3.1-8b", gpu="4090", tuning="qlora")
        print(f"{'':40} {'min':>8} {'median':>8}   ({runs} runs, load {os.getloadavg()[0]:.1f})")
        for size in SIZES:
            name = f"{size[0]}x{size[1]}"
            paints, processor, waits = [], [], []
            for _ in range(runs):
                state.save(State(plan, live=False))
                paint, cpu, more = measure(size, plan)
                paints.append(paint)
                processor.append(cpu)
                waits += more
            row(f"{name}: start to first paint", paints, PAINT)
            row(f"{name}: of that, processor time", processor, PAINT)
            row(f"{name}: key to its answer", waits, KEY)


if __name__ == "__main__":
    main()
