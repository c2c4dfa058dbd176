"""Replay a trace recorded from PyTorch's own allocator and compare after every event.

    python -m fitcheck.bench.allocator TRACE.csv.gz [--limit BYTES] [--expandable] ...

prints `events N mismatches M`, the first mismatch to stderr, and exits 1 if there is any, 2 if the
file is no trace. One event a line; ALLOCATED and RESERVED are PyTorch's counters right after it:

    a,ID,SIZE,ALLOCATED,RESERVED    allocate SIZE bytes as block ID
    f,ID,ALLOCATED,RESERVED         free block ID
    e,0,ALLOCATED,RESERVED          empty the cache
    o,SIZE,ALLOCATED,RESERVED       allocating SIZE raised out of memory
    s,RETRIES,OOMS,PEAK_ALLOCATED,PEAK_RESERVED    the counters so far; not counted as an event
"""

from __future__ import annotations

import argparse
import gzip
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

from fitcheck.bench.allocator import (
    LARGE_SEGMENT,
    MAX_NON_SPLIT_ROUNDING,
    MIB,
    Allocator,
    OutOfMemory,
)
from fitcheck.errors import FitCheckError

FIELDS = {"a": 4, "f": 3, "e": 3, "o": 3, "s": 4}  # numbers after the letter


def compare(lines: Iterable[str], allocator: Allocator) -> tuple[int, list[str]]:
    """Replay recorded lines: how many events there were, and each difference in words."""
    blocks: dict[int, int] = {}
    events = 0
    differences: list[str] = []
    for number, line in enumerate(lines, 1):
        action, fields = _parsed(number, line)
        if action == "s":
            outcome = ""
            recorded = fields
            ours = [allocator.retries, allocator.ooms]
            ours += [allocator.peak_allocated, allocator.peak_reserved]
        else:
            events += 1
            outcome = _apply(action, fields[0], fields[1], blocks, allocator)
            recorded = fields[-2:]
            ours = [allocator.allocated, allocator.reserved]
        if outcome or recorded != ours:
            differences.append(
                f"line {number}: {line.strip()}: {outcome or 'same outcome'}, "
                f"recorded {recorded}, model {ours}"
            )
    return events, differences


def _parsed(number: int, line: str) -> tuple[str, list[int]]:
    action, *fields = line.strip().split(",")
    if len(fields) != FIELDS.get(action) or not all(field.isdecimal() for field in fields):
        raise FitCheckError(
            f"line {number} is no event of an allocator trace: {line.strip()[:80]}",
            "a line reads a,ID,SIZE,ALLOCATED,RESERVED or f,ID,ALLOCATED,RESERVED, for example",
        )
    return action, [int(field) for field in fields]


def _apply(action: str, first: int, second: int, blocks: dict[int, int], to: Allocator) -> str:
    """Do one event; what came out differently from the recording, if anything."""
    try:
        if action == "a":
            blocks[first] = to.malloc(second)
        elif action == "o":
            to.free(to.malloc(first))
            return "no out of memory"
        elif action == "f" and first not in blocks:
            return f"block {first} is not live"
        elif action == "f":
            to.free(blocks.pop(first))
        else:
            to.empty_cache()
    except OutOfMemory as error:
        return "" if action == "o" else f"out of memory ({error})"
    return ""


def _divisions(text: str) -> int | dict[int | str, int]:
    """`8`, or by size as in PYTORCH_CUDA_ALLOC_CONF: `[64:8,256:4,>:1]`."""
    if text.isdecimal():
        return int(text)
    pairs = (pair.split(":") for pair in text.strip("[]").split(","))
    return {key if key == ">" else int(key): int(value) for key, value in pairs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fitcheck.bench.allocator",
        description="Replay a trace recorded from PyTorch's CUDA caching allocator and compare.",
    )
    parser.add_argument("trace", type=Path, metavar="TRACE.csv.gz")
    parser.add_argument("--limit", type=int, metavar="BYTES", help="memory of the card")
    parser.add_argument("--memory-fraction", type=float, default=1.0, metavar="F")
    parser.add_argument("--expandable", action="store_true", help="expandable_segments:True")
    parser.add_argument("--max-split-size-mb", type=int, metavar="N")
    parser.add_argument(
        "--max-non-split-rounding-mb", type=int, default=MAX_NON_SPLIT_ROUNDING // MIB, metavar="N"
    )
    parser.add_argument(
        "--large-segment-size-mb", type=int, default=LARGE_SEGMENT // MIB, metavar="N"
    )
    parser.add_argument("--roundup-power2-divisions", type=_divisions, default=0, metavar="D")
    parser.add_argument("--garbage-collection-threshold", type=float, default=0.0, metavar="F")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; its exit code."""
    args = _parser().parse_args(argv)
    split = args.max_split_size_mb
    allocator = Allocator(
        args.limit,
        expandable_segments=args.expandable,
        max_split_size=None if split is None else split * MIB,
        max_non_split_rounding=args.max_non_split_rounding_mb * MIB,
        large_segment_size=args.large_segment_size_mb * MIB,
        roundup_power2_divisions=args.roundup_power2_divisions,
        garbage_collection_threshold=args.garbage_collection_threshold,
        per_process_memory_fraction=args.memory_fraction,
    )
    try:
        with gzip.open(args.trace, "rt", encoding="ascii") as lines:
            events, differences = compare(lines, allocator)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        print(f"error: cannot read {args.trace}: {error}", file=sys.stderr)
        return 2
    except FitCheckError as error:
        print(f"error: {args.trace}: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        return 2
    print(f"events {events} mismatches {len(differences)}")
    if differences:
        print(differences[0], file=sys.stderr)
    return int(bool(differences))
