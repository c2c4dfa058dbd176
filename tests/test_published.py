"""The dry run against what others measured on a card: every single-card run of whole steps."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.published import FILE, single, traced  # noqa: E402

pytestmark = pytest.mark.oracle
RUNS = single(json.loads(FILE.read_bytes()))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run["id"]))
def test_within_two_percent(run: dict[str, Any]) -> None:
    """What is recorded beside it is what is traced: `python -m benchmarks.published --write`."""
    said = traced(run)
    assert said["allocated_bytes"] == pytest.approx(run["measured"]["allocated_bytes"], rel=0.02)
    assert run["predicted"]["dry-run"] == said
