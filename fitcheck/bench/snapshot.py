"""A replayed trace as one of PyTorch's own memory snapshots, to be opened in its memory viewer.

    write_snapshot(Path("step.pickle"), events, Allocator(limit_bytes))

writes what `torch.cuda.memory._dump_snapshot` of PyTorch 2.13 would have written after the real
run: `python -m torch.cuda._memory_viz trace_plot step.pickle -o step.html` draws it, and so does
https://docs.pytorch.org/memory_viz. The file is a pickle; FitCheck writes them and reads none.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fitcheck.bench.allocator import (
    LARGE_BASE,
    LARGE_SEGMENT,
    MAX_NON_SPLIT_ROUNDING,
    MIB,
    UNLIMITED,
    Allocator,
    OutOfMemory,
)

Frame = tuple[str, int, str]  # file name, line, function
MAX_ENTRIES = 200_000  # of the device trace, the last ones; the viewer slows down with more
POOL = (0, 0)  # the default memory pool, as no CUDA graph is captured


def write_snapshot(
    path: Path,
    events: Iterable[tuple[int, int]],
    allocator: Allocator,
    *,
    frames: Mapping[int, Sequence[Frame]] | None = None,
    notes: Mapping[int, str] | None = None,
    max_entries: int = MAX_ENTRIES,
) -> None:
    """Replay `events` through a fresh `allocator`, up to an out of memory, and write the snapshot.

    `frames` (innermost call first) and `notes` (role, phase; shown as user metadata) are those of
    the events by index; freed blocks and segments show them too. As PyTorch does, the device trace
    keeps its last `max_entries` entries; what was live before them is in the segments.
    """
    data = snapshot(events, allocator, frames=frames, notes=notes, max_entries=max_entries)
    with path.open("wb") as file:
        pickle.dump(data, file, protocol=4)  # what the viewer's own unpickler reads


def snapshot(
    events: Iterable[tuple[int, int]],
    allocator: Allocator,
    *,
    frames: Mapping[int, Sequence[Frame]] | None = None,
    notes: Mapping[int, str] | None = None,
    max_entries: int = MAX_ENTRIES,
) -> dict[str, Any]:
    """What `write_snapshot` writes."""
    recorder = _Recorder(allocator, frames or {}, notes or {}, max_entries)
    try:
        for index, (size, name) in enumerate(events):
            recorder.event(index, size, name)
    except OutOfMemory as error:
        recorder.entry("oom", error.requested, device_free=error.free)
    return {
        "segments": recorder.segments(),
        "device_traces": [list(recorder.trace)],
        "allocator_settings": _settings(allocator),
        "external_annotations": [],
    }


class _Recorder:
    """Runs events and keeps what PyTorch's memory history would have kept."""

    def __init__(
        self,
        allocator: Allocator,
        frames: Mapping[int, Sequence[Frame]],
        notes: Mapping[int, str],
        max_entries: int,
    ) -> None:
        self.allocator = allocator
        self.frames = frames
        self.notes = notes
        self.trace: deque[dict[str, Any]] = deque(maxlen=max_entries)
        self.index = 0  # of the event under way
        self.blocks: dict[int, int] = {}  # name in the trace -> block
        self.live: dict[int, tuple[int, int]] = {}  # block -> (requested bytes, event)
        allocator.on_segment(lambda action, addr, size: self.entry(action, size, addr=addr))

    def event(self, index: int, size: int, name: int) -> None:
        self.index = index
        if size > 0:
            block = self.allocator.malloc(size)
            self.blocks[name] = block
            self.live[block] = (size, index)
            self.entry("alloc", size, addr=block)
        elif size == 0:
            block = self.blocks.pop(name)
            requested, _ = self.live.pop(block)
            self.entry("free_requested", requested, addr=block)
            self.allocator.free(block)
            self.entry("free_completed", requested, addr=block)
        else:
            self.allocator.empty_cache()

    def entry(self, action: str, size: int, **where: int) -> None:
        """One line of the device trace; `where` is addr, or device_free for out of memory."""
        self.trace.append(
            {
                "action": action,
                **where,
                "size": size,
                "stream": 0,
                "time_us": self.index,  # no clock ran: the index orders the entries as well
                "compile_context": "N/A",
                "user_metadata": self.notes.get(self.index, ""),
                "pool_id": POOL,
                "frames": self.stack(self.index),
            }
        )

    def stack(self, index: int) -> list[dict[str, Any]]:
        return [
            {"name": name, "filename": filename, "line": line}
            for filename, line, name in self.frames.get(index, ())
        ]

    def segments(self) -> list[dict[str, Any]]:
        """The state at the end; blocks that touch are one segment."""
        segments: list[dict[str, Any]] = []
        end = None
        for address, size, is_live in self.allocator.blocks():
            if address != end:
                segments.append(self.segment(address))
            end = address + size
            segment = segments[-1]
            requested, index = self.live.get(address, (0, -1))
            segment["total_size"] += size
            segment["allocated_size"] += size if is_live else 0
            segment["active_size"] = segment["allocated_size"]
            segment["requested_size"] += requested
            segment["blocks"].append(
                {
                    "address": address,
                    "size": size,
                    "requested_size": requested,
                    "state": "active_allocated" if is_live else "inactive",
                    "frames": self.stack(index),
                }
            )
        return segments

    def segment(self, address: int) -> dict[str, Any]:
        return {
            "device": 0,
            "address": address,
            "total_size": 0,
            "allocated_size": 0,
            "active_size": 0,
            "requested_size": 0,
            "stream": 0,
            "segment_type": "large" if address >= LARGE_BASE else "small",
            "segment_pool_id": POOL,
            "is_expandable": self.allocator.expandable_segments,
            "frames": [],
            "blocks": [],
        }


def _settings(allocator: Allocator) -> dict[str, Any]:
    """As PyTorch 2.13 records its settings; what the model has no notion of at its default."""
    split = allocator.max_split_size
    table = allocator.divisions
    conf = []
    if allocator.expandable_segments:
        conf.append("expandable_segments:True")
    if split != UNLIMITED:
        conf.append(f"max_split_size_mb:{split // MIB}")
    if allocator.max_non_split_rounding != MAX_NON_SPLIT_ROUNDING:
        conf.append(f"max_non_split_rounding_mb:{allocator.max_non_split_rounding // MIB}")
    if allocator.large_segment_size != LARGE_SEGMENT:
        conf.append(f"large_segment_size_mb:{allocator.large_segment_size // MIB}")
    if any(table):
        pairs = ",".join(f"{1 << i}:{divisions}" for i, divisions in enumerate(table))
        conf.append(f"roundup_power2_divisions:[{pairs}]")
    if allocator.garbage_collection_threshold:
        conf.append(f"garbage_collection_threshold:{allocator.garbage_collection_threshold}")
    return {
        "PYTORCH_CUDA_ALLOC_CONF": ",".join(conf),
        "max_split_size": -1 if split == UNLIMITED else split,
        "garbage_collection_threshold": allocator.garbage_collection_threshold,
        "expandable_segments": allocator.expandable_segments,
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "graph_capture_record_stream_reuse": False,
        "max_round_threshold": -1,
        "max_cached_size": -1,
        "roundup_power2_divisions": {str(1 << i): n for i, n in enumerate(table)},
    }
