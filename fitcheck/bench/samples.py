"""Which moments of a trace a memory timeline shows: the fullest one of each of its columns.

A picture has a few hundred columns and a trace up to a million events. A column shows the moment of
its events at which most memory was held, so that no peak is lost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

from fitcheck.bench.allocator import Allocator, OutOfMemory

COLUMNS = 480
MIN_COLUMNS = 12  # of a phase, however few its events


class Sample(NamedTuple):
    """What is held after an event, by its index: bytes by role, bytes reserved (0: not known)."""

    event: int
    roles: Mapping[str, int]
    reserved: int = 0

    @property
    def total(self) -> int:
        """Bytes of all roles."""
        return sum(self.roles.values())


def samples(
    events: Sequence[tuple[int, int]],
    roles: Mapping[int, str],
    allocator: Allocator,
    marks: Sequence[tuple[int, str]] = (),
) -> list[Sample]:
    """Replay `events` through `allocator`: the fullest moment of each column, in order.

    `roles` names the role of each allocation id, "other" where it does not. Bytes are those of
    blocks, as `torch.cuda.memory_allocated` counts them; `reserved` is the column's highest. Ends
    where memory runs out. Events and marks are those of `replay`.
    """
    starts = column_starts(len(events), marks)
    begins = {index for index, _ in marks}
    held: dict[str, int] = {}
    live: dict[int, tuple[int, int]] = {}  # id -> (block, its bytes)
    chosen: list[Sample] = []
    column, most, reserved = -1, -1, 0
    try:
        for index, (size, name) in enumerate(events):
            if column + 1 < len(starts) and index >= starts[column + 1]:
                column = bisect_right(starts, index) - 1
                most, reserved = -1, 0
                if index in begins:  # a phase's peak includes what it finds
                    most, reserved = allocator.allocated, allocator.reserved
                    chosen.append(Sample(index, dict(held), reserved))
            if size > 0:
                before = allocator.allocated
                block = allocator.malloc(size)
                taken = allocator.allocated - before
                live[name] = block, taken
                role = roles.get(name, "other")
                held[role] = held.get(role, 0) + taken
            elif size == 0:
                block, taken = live.pop(name)
                allocator.free(block)
                held[roles.get(name, "other")] -= taken
            else:
                allocator.empty_cache()
            reserved = max(reserved, allocator.reserved)
            if allocator.allocated > most:
                if most >= 0:  # the column had a sample before
                    chosen.pop()
                most = allocator.allocated
                chosen.append(Sample(index, dict(held), reserved))
            elif reserved > chosen[-1].reserved:
                chosen[-1] = chosen[-1]._replace(reserved=reserved)
    except OutOfMemory:
        pass  # nothing happens after it
    return chosen


def column_starts(length: int, marks: Sequence[tuple[int, str]]) -> list[int]:
    """The first event of each column.

    A phase's width grows with the square root of its events: a rollout has a hundred times those
    of an update, and both are to be seen.
    """
    bounds = sorted({0, length, *(index for index, _ in marks if 0 < index < length)})
    shares = [sqrt(end - begin) for begin, end in pairwise(bounds)]
    starts: list[int] = []
    for (begin, end), share in zip(pairwise(bounds), shares, strict=True):
        count = max(MIN_COLUMNS, round(COLUMNS * share / sum(shares)))
        starts += [begin + (end - begin) * i // count for i in range(count)]
    return starts


def fullest(samples: Sequence[Sample], starts: Sequence[int], length: int) -> list[Sample]:
    """The fullest sample of every column; where a column has none, what was last before it."""
    columns: list[Sample] = []
    place = 0
    last = Sample(0, {})
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        inside = []
        # Columns of one event share their start: the first of them takes it.
        while place < len(samples) and samples[place].event < max(end, start + 1):
            inside.append(samples[place])
            place += 1
        if inside:
            most = max(inside, key=lambda sample: sample.total)
            reserved = max(sample.reserved for sample in inside)
            columns.append(most._replace(reserved=reserved))
            last = inside[-1]
        else:
            columns.append(last._replace(event=start))
    return columns
