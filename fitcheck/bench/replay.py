"""Replay of a trace through the allocator: the peaks of each phase, and whether memory runs out.

    replay(traced.events, Allocator(limit_bytes), traced.marks, traced.rounds)

The rounds of a loop that are alike were traced once or twice. Here all of them are played, since
under a limit a later one may flush the cache or fail where the ones before did not; but only until
one leaves the allocator as the one before it did, as all that follow then do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fitcheck.bench.allocator import Allocator, OutOfMemory


@dataclass(frozen=True, slots=True)
class Rounds:
    """events[begin:end] are a round of a loop, and come `count` more times after it."""

    begin: int
    end: int
    count: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The peaks from one mark to the next, what is already held at the mark included; bytes."""

    name: str
    allocated: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Replay:
    """What replaying a trace came to; bytes."""

    peak_allocated: int
    peak_reserved: int
    retries: int
    """times the cache was flushed to go on, in the rounds that were played"""
    oom: int | None
    """index of the event at which memory ran out, None if it never did"""
    marks: tuple[Peak, ...] = ()
    """one for each mark that was reached"""


def replay(
    events: Iterable[tuple[int, int]],
    allocator: Allocator,
    marks: Sequence[tuple[int, str]] = (),
    rounds: Sequence[Rounds] = (),
) -> Replay:
    """Run `events` through `allocator`, up to the first out of memory.

    An event is (size, id): size > 0 allocates that many bytes under the name id, (0, id) frees
    them, (-1, 0) empties the cache. A mark (index, name) begins a phase before the event of that
    index; marks are in the order of their index. Rounds are in the order of their end, and lie
    within each other or apart.
    """
    player = _Player(list(events), allocator, rounds)
    before = allocator.peak_allocated, allocator.peak_reserved, allocator.retries
    spans = [(0, ""), *marks]  # the first one: what comes before the first mark
    ends = [*(index for index, _ in marks), len(player.events)]
    peaks: list[Peak] = []
    oom = None
    for (begin, name), end in zip(spans, ends, strict=True):
        allocator.reset_peaks()
        try:
            player.play(begin, end, rounds)
        except OutOfMemory:
            oom = player.index
        peaks.append(Peak(name, allocator.peak_allocated, allocator.peak_reserved))
        if oom is not None:
            break

    peak_allocated = max(player.peak_allocated, *(peak.allocated for peak in peaks))
    peak_reserved = max(player.peak_reserved, *(peak.reserved for peak in peaks))
    allocator.reset_peaks(max(before[0], peak_allocated), max(before[1], peak_reserved))
    retries = allocator.retries - before[2]
    return Replay(peak_allocated, peak_reserved, retries, oom, tuple(peaks[1:]))


class _Player:
    """Plays events; `index` is that of the one at which memory ran out.

    What further rounds need is in `peak_allocated` and `peak_reserved`, and in no phase's peak.
    """

    def __init__(
        self, events: list[tuple[int, int]], allocator: Allocator, rounds: Sequence[Rounds]
    ) -> None:
        self.events = events
        self.allocator = allocator
        self.rounds = rounds
        self.blocks: dict[int, int] = {}  # id -> block
        self.index = self.peak_allocated = self.peak_reserved = 0

    def play(self, begin: int, end: int, rounds: Sequence[Rounds], again: bool = False) -> None:
        """The events from begin to end, and all the rounds of those loops that end there."""
        run = self._run_again if again else self._run
        for loop in rounds:
            if begin < loop.end <= end:
                run(begin, loop.end)
                begin = loop.end
                self._repeat(loop)
        run(begin, end)

    def _repeat(self, loop: Rounds) -> None:
        """The further rounds of a loop, those of loops inside it included."""
        allocator = self.allocator
        inner = [
            other
            for other in self.rounds
            if loop.begin <= other.begin and other.end <= loop.end and other != loop
        ]
        peaks = allocator.peak_allocated, allocator.peak_reserved
        before = None
        for _ in range(loop.count):
            state = self._state()
            if state == before:
                break
            before = state
            self.play(loop.begin, loop.end, inner, again=True)
        self.peak_allocated = max(self.peak_allocated, allocator.peak_allocated)
        self.peak_reserved = max(self.peak_reserved, allocator.peak_reserved)
        allocator.reset_peaks(*peaks)

    def _state(self) -> tuple[object, ...]:
        return self.allocator.state(), self.blocks.copy()

    def _run(self, begin: int, end: int) -> None:
        blocks, malloc, free = self.blocks, self.allocator.malloc, self.allocator.free
        index = begin
        try:
            for index, (size, name) in enumerate(self.events[begin:end], begin):  # noqa: B007
                if size > 0:
                    blocks[name] = malloc(size)
                elif size == 0:
                    free(blocks.pop(name))
                else:
                    self.allocator.empty_cache()
        except OutOfMemory:
            self.index = index
            raise

    def _run_again(self, begin: int, end: int) -> None:
        """A further round: what the one before it left is replaced; what it freed is gone."""
        blocks, malloc, free = self.blocks, self.allocator.malloc, self.allocator.free
        index = begin
        try:
            for index, (size, name) in enumerate(self.events[begin:end], begin):  # noqa: B007
                if size > 0:
                    old = blocks.get(name)
                    blocks[name] = malloc(size)
                    if old is not None:
                        free(old)
                elif size == 0:
                    if name in blocks:
                        free(blocks.pop(name))
                else:
                    self.allocator.empty_cache()
        except OutOfMemory:
            self.index = index
            raise
