"""Start-up is a feature: what a question asked of the catalog must not load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each costs more than a whole answer: pydantic about 0.1 s, textual 0.3 s, torch seconds.
HEAVY = {
    "huggingface_hub",
    "numpy",
    "psutil",
    "pydantic",
    "pynvml",
    "textual",
    "torch",
    "transformers",
}
QUESTION = ["check", "llama-3.1-8b", "--gpu", "4090"]


def loaded_packages(code: str, *arguments: str) -> set[str]:
    """Top-level names of every module that a fresh Python imports while it runs `code`."""
    # -X importtime rather than sys.modules: it also shows what was imported and dropped again.
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode in (0, 1), run.stderr  # 1 is an answer too: it does not fit
    assert "Traceback" not in run.stderr, run.stderr
    names = re.findall(r"^import time:.*\|\s*(\w+)[\w.]*$", run.stderr, re.MULTILINE)
    return set(names)


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_packages("import fitcheck, fitcheck.cli")
    assert "fitcheck" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("output", [[], ["--json"]], ids=["text", "json"])
def test_a_check_of_catalog_names_loads_nothing_heavy(output: list[str]) -> None:
    loaded = loaded_packages(
        "import sys; from fitcheck.cli import main; sys.exit(main())", *QUESTION, *output
    )
    assert "fitcheck" in loaded
    assert loaded & HEAVY == set()


def test_a_check_loads_no_other_verb() -> None:
    code = "import sys; from fitcheck.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run(
        [sys.executable, "-c", code, *QUESTION], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    loaded = set(run.stderr.split())
    assert "fitcheck.text" in loaded
    others = {"accuracy", "fitting", "listing", "machine", "records", "worker"}
    assert loaded & {f"fitcheck.{name}" for name in others} == set()


def test_the_screen_never_loads_torch() -> None:
    """It would take seconds, and on a GPU a context of the very card that is judged."""
    code = (
        "import asyncio; from fitcheck import resolve; from fitcheck.tui.app import FitCheckApp\n"
        "async def main():\n"
        "    app = FitCheckApp(resolve('llama-3.1-8b', gpu='4090'))\n"
        "    async with app.run_test(size=(160, 45)) as pilot:\n"
        "        await pilot.press('e', 'c', 'c', 'escape', 'l', 'w', 'question_mark', 'escape')\n"
        "asyncio.run(main())"
    )
    loaded = loaded_packages(code)
    assert "textual" in loaded
    assert loaded & {"torch", "transformers", "numpy", "huggingface_hub"} == set()
