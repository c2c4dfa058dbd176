"""Catalog rows written from what the Hub's files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import LLAMA, folder

from fitcheck import catalog, files, updating
from fitcheck.cli import main
from fitcheck.errors import FitCheckError
from fitcheck.hub import local
from fitcheck.model import Model


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A catalog of two families in a checkout of its own, and a Hub that has one model."""
    models = tmp_path / "catalog/models"
    models.mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    source = Path(files.ROOT)
    shutil.copy(source / "configs.json", tmp_path / "catalog")
    entries = catalog.model_entries()
    kept = [e for e in entries if e["file"] in ("qwq.json", "qwen3.json")]
    (models / "index.json").write_text(json.dumps({"models": kept}))
    for name in ("qwq.json", "qwen3.json"):
        shutil.copy(source / "models" / name, models)
    place = tmp_path / "tiny"
    place.mkdir()
    for name, content in folder(LLAMA).items():
        (place / name).write_bytes(content)
    monkeypatch.setattr(files, "ROOT", str(tmp_path / "catalog"))
    files.read.cache_clear()
    monkeypatch.setattr(updating, "read", lambda name: replace(local(str(place)), id=name))
    yield tmp_path
    files.read.cache_clear()


def test_a_new_model_becomes_a_row_that_is_found(checkout: Path) -> None:
    assert main(["models", "--update", "org/tiny-1b", "--family", "Tiny"]) == 0
    found = catalog.find_model("org/tiny-1b")
    assert isinstance(found, Model) and found.is_verified and not found.is_read
    assert found.params == found.params_published
    assert found.family == "Tiny" and "headers" in found.checked
    assert (checkout / "catalog/models/tiny.json").exists()


def test_a_row_keeps_what_no_header_says_and_its_place(checkout: Path) -> None:
    before = catalog.find_model("Qwen/QwQ-32B")
    neighbours = [e["id"] for e in catalog.model_entries()]
    updating.update(["Qwen/QwQ-32B"], None)
    after = catalog.find_model("Qwen/QwQ-32B")
    assert (after.license, after.release_date) == (before.license, before.release_date)
    assert after.hidden_size == LLAMA["hidden_size"] != before.hidden_size
    assert [e["id"] for e in catalog.model_entries()] == neighbours


def test_rewriting_a_family_changes_no_other_row(checkout: Path) -> None:
    path = checkout / "catalog/models/qwen3.json"
    before = json.loads(path.read_text())["models"]
    updating.update(["org/tiny-1b"], "Qwen3")
    assert json.loads(path.read_text())["models"][:-1] == before


@pytest.mark.parametrize(
    ("names", "family", "status", "words"),
    [
        (["org/tiny-1b"], None, "headers", "of which family"),
        (["org/tiny-1b"], "Tiny", "mismatch", "not verified"),
        (["org/tiny-1b"], "Tiny", "config", "not verified"),
        (["tiny"], "Tiny", "headers", "no Hub id"),
        ([], "Tiny", "headers", "which models"),
    ],
)
def test_what_is_not_verified_is_not_written(
    checkout: Path, monkeypatch: pytest.MonkeyPatch,
    names: list[str], family: str | None, status: str, words: str,
) -> None:  # fmt: skip
    model = replace(local(str(checkout / "tiny")), status=status)
    monkeypatch.setattr(updating, "read", lambda name: model)
    with pytest.raises(FitCheckError, match=words):
        updating.update(names, family)
    assert not (checkout / "catalog/models/tiny.json").exists()
