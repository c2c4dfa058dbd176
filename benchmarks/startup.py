"""Wall time of whole processes, from the shell's point of view: `make bench`.

    python benchmarks/startup.py [--runs 20]

The first row is Python itself; what the others take beyond it is ours.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

# The installed command where there is one: its start is part of what a user waits for.
INSTALLED = shutil.which("fitcheck", path=str(Path(sys.executable).parent))
FITCHECK = (
    [INSTALLED]
    if INSTALLED
    else [sys.executable, "-c", "import sys; from fitcheck.cli import main; sys.exit(main())"]
)
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "fitcheck --help": [*FITCHECK, "--help"],
    "fitcheck check llama-3.1-8b --gpu 4090": [*FITCHECK, "check", "llama-3.1-8b", "--gpu", "4090"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    run = subprocess.run(command, capture_output=True)
    elapsed = time.perf_counter() - start
    if run.returncode not in (0, 1):  # 1 is an answer too: it does not fit
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr.decode(errors='replace')}")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    print(f"{'':40} {'min':>8} {'median':>8}   ({runs} runs)")
    for name, command in COMMANDS.items():
        seconds(command)  # compiles .pyc files and warms the disk cache
        times = [seconds(command) * 1e3 for _ in range(runs)]
        print(f"{name:40} {min(times):5.0f} ms {statistics.median(times):5.0f} ms")


if __name__ == "__main__":
    main()
