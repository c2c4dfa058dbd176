"""A replayed trace as a memory snapshot: PyTorch's own records, and its own viewer."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fitcheck.bench.allocator import MIB, Allocator
from fitcheck.bench.snapshot import snapshot, write_snapshot

DATA = Path(__file__).parent / "data" / "allocator"


def recorded(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / f"snapshot_{name}.json.gz").read_bytes()))


@pytest.fixture(params=["default", "expandable"])
def both(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What PyTorch recorded, and ours of the same events."""
    theirs = recorded(request.param)
    allocator = Allocator(700_000_000, expandable_segments=request.param == "expandable")
    return theirs, snapshot([(size, name) for size, name in theirs["events"]], allocator)


def test_the_device_trace_is_pytorchs(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = both
    (trace,) = ours["device_traces"]
    assert [[entry["action"], entry["size"]] for entry in trace] == theirs["trace"]
    assert trace[-1]["action"] == "oom" and "addr" not in trace[-1]


def test_the_segments_are_pytorchs(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = both

    def comparable(segment: dict[str, Any]) -> str:
        """Without addresses, and what free blocks were last asked for."""
        kept = {key: segment[key] for key in theirs["segments"][0] if key != "blocks"}
        blocks = [
            (b["size"], b["state"], b["requested_size"] if b["state"] != "inactive" else 0)
            for b in segment["blocks"]
        ]
        return json.dumps([kept, blocks])

    assert sorted(map(comparable, ours["segments"])) == sorted(map(comparable, theirs["segments"]))


def test_every_record_has_pytorchs_keys(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = both
    assert sorted(ours) == theirs["keys"]
    assert sorted(ours["segments"][0]) == theirs["segment_keys"]
    assert sorted(ours["segments"][0]["blocks"][0]) == theirs["block_keys"]
    assert sorted(ours["allocator_settings"]) == theirs["settings_keys"]
    keys = {key for entry in ours["device_traces"][0] for key in entry}
    assert keys == {*theirs["trace_keys"], "frames"}  # recorded without stacks


EVENTS = [(3_000_000, 0), (200, 1), (0, 0), (50_000_000, 2), (-1, 0), (0, 1)]


def test_stacks_and_notes_go_with_their_events() -> None:
    data = snapshot(
        EVENTS,
        Allocator(),
        frames={3: [("model.py", 12, "forward"), ("train.py", 3, "main")]},
        notes={2: "policy, <update>"},
    )
    (trace,) = data["device_traces"]
    free = [entry for entry in trace if entry["action"] == "free_requested"][0]
    assert (free["user_metadata"], free["frames"]) == ("policy, <update>", [])
    stack = [
        {"name": "forward", "filename": "model.py", "line": 12},
        {"name": "main", "filename": "train.py", "line": 3},
    ]
    assert [e["action"] for e in trace if e["frames"] == stack] == ["segment_alloc", "alloc"]
    blocks = [block for segment in data["segments"] for block in segment["blocks"]]
    assert [b["requested_size"] for b in blocks if b["frames"] == stack] == [50_000_000]


def test_a_long_trace_keeps_its_end() -> None:
    data = snapshot(EVENTS, Allocator(), max_entries=3)
    actions = [entry["action"] for entry in data["device_traces"][0]]
    assert actions == ["segment_free", "free_requested", "free_completed"]
    assert sum(segment["allocated_size"] for segment in data["segments"]) == 50_331_648


def test_settings_are_told_as_pytorch_tells_them() -> None:
    allocator = Allocator(
        expandable_segments=True,
        max_split_size=64 * MIB,
        garbage_collection_threshold=0.5,
        roundup_power2_divisions={1: 2, ">": 8},
    )
    told = snapshot([], allocator)["allocator_settings"]
    assert told["PYTORCH_CUDA_ALLOC_CONF"].startswith(
        "expandable_segments:True,max_split_size_mb:64"
    )
    assert told["max_split_size"] == 64 * MIB
    assert told["roundup_power2_divisions"]["1"] == 2
    assert told["roundup_power2_divisions"]["32768"] == 8


def test_the_file_is_plain_data(tmp_path: Path) -> None:
    """No class of ours in the pickle: whoever opens it needs nothing of FitCheck."""

    class Strict(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise AssertionError(f"{module}.{name} in the snapshot")

    path = tmp_path / "step.pickle"
    write_snapshot(path, EVENTS, Allocator())
    with path.open("rb") as file:
        assert Strict(file).load() == snapshot(EVENTS, Allocator())


@pytest.mark.oracle
@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch: fitcheck-rlhf[bench]")
def test_pytorchs_viewer_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "step.pickle"
    write_snapshot(path, [*EVENTS, (2**60, 9)], Allocator(10**9), notes={0: "policy"})

    page = tmp_path / "step.html"
    command = ["torch.cuda._memory_viz", "trace_plot", str(path), "-o", str(page)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", *command], check=True)
    assert "MemoryViz.js" in page.read_text() and "base64" in page.read_text()

    from torch.cuda._memory_viz import trace

    told = trace(pickle.loads(path.read_bytes()))
    assert "cudaMalloc(" in told and "raise OutOfMemoryError" in told
