"""What every test shares: a hermetic environment, golden files, and the reasons to skip.

    def test_answer(golden, capsys):
        main(["check", "llama-3.1-8b", "--gpu", "4090"])
        golden("check-8b-4090", capsys.readouterr().out)

compares with tests/golden/check-8b-4090.txt; `make golden` writes it.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
HOMES = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew")
    parser.addoption(
        "--index",
        action="store_true",
        help="test_install: take the dependencies from the package index (needs the network)",
    )
    parser.addoption("--slow", action="store_true", help="also what takes long (make oracle-check)")


def pytest_configure() -> None:
    # Before any test module is imported: huggingface_hub reads these once, at its own import.
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    no_oracle = pytest.mark.skip(reason=f"needs {' and '.join(missing)} (fitcheck-rlhf[bench])")
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    no_gpu = pytest.mark.skip(reason="needs a CUDA card")
    if gpu_items and ("torch" in missing or not _cuda_is_available()):
        for item in gpu_items:
            item.add_marker(no_gpu)
    if missing:
        for item in items:
            if item.get_closest_marker("oracle"):
                item.add_marker(no_oracle)


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No colour, width, credentials or saved state of whoever runs the tests."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    home = tmp_path_factory.getbasetemp() / f"home{next(HOMES)}"  # made only if written to
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) fails unless text is what tests/golden/NAME.txt holds."""
    update: bool = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        # No trailing blanks in a file that people read and editors trim; screens are full of them.
        text = "".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines())
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        if not path.exists():
            pytest.fail(f"{path} is missing: run `make golden`, then read it", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), path.name, "now", lineterm=""
            )
            pytest.fail("\n".join([*diff, "to accept: make golden"]), pytrace=False)

    return compare
