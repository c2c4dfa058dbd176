"""benchmarks/gpu_suite.py as far as it goes without a card."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks/gpu_suite.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_carried_is_what_fitcheck_needs(suite: ModuleType) -> None:
    """All of the project's dependencies but the screen, and but what the machine itself brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    names = {re.split(r"[<>=\[]", name)[0] for name in wanted}
    own = {"textual", "huggingface-hub", "torch", "transformers"}
    assert names - own - set(suite.NEEDED.values()) == set()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:CARRIED|ALONE) := (.*)", makefile, re.MULTILINE)
    of_pydantic = {"pydantic-core", "annotated-types", "typing-inspection"}  # it brings these
    assert {*" ".join(listed).split(), *of_pydantic} == set(suite.NEEDED.values())


def test_only_what_is_missing_is_installed_and_from_the_wheels_alone(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    code = SimpleNamespace(returncode=0)
    monkeypatch.setattr(suite.subprocess, "run", lambda words: [ran.append(words), code][1])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == "peft" else name)
    suite.carry()
    (words,) = ran
    assert "--no-index" in words and words[-1] == "peft"
    monkeypatch.setattr(suite, "find_spec", lambda name: name)
    suite.carry()
    assert len(ran) == 1
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    code.returncode = 1
    with pytest.raises(SystemExit, match="make gpu-wheels"):
        suite.carry()


def test_parts_first_then_the_suite_in_the_time_left(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], **options: Any) -> SimpleNamespace:
        ran.append(words)
        assert options["env"]["HF_HUB_OFFLINE"] == "1"
        assert options["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        return SimpleNamespace(returncode=1 if "--suite" in words else 0, stdout='{"card": "x"}\n')

    monkeypatch.setattr(suite.subprocess, "run", run)
    monkeypatch.setattr(suite, "carry", lambda: None)
    for _ in range(2):  # begun again, it goes on
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--minutes", "5", "--to", str(tmp_path)])
        assert suite.main() == 1  # the suite's own
    parts = [words[-1] for words in ran if "--part" in words]
    assert parts == ["context", "attention"]
    assert json.loads((tmp_path / "context.json").read_text()) == {"card": "x"}
    last = ran[-1]
    assert 4.9 < float(last[last.index("--minutes") + 1]) <= 5
