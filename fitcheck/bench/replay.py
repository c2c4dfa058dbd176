"""Replay of a trace through the allocator: the peaks of each phase, and whether memory runs out.

    replay(traced.events, Allocator(limit_bytes), traced.marks, traced.rounds)

The rounds of a loop that are alike were traced once or twice. Here all of them are played, since
under a limit a later one may flush the cache or fail where the ones before did not; but only until
one leaves the allocator as the one before it did, as all that follow then do.
"""

from __future__ import annotations

from bisect import bisect_left
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
    before = allocator.peak_allocated, allocator.peak_reserved, allocator.retries
    player = _Player(list(events), allocator, marks, rounds)
    try:
        player.play(0, len(player.events) + 1, rounds, again=False)
    except OutOfMemory:
        oom: int | None = player.index
    else:
        oom = None
    peak_allocated = max(allocated for allocated, _ in player.peaks)
    peak_reserved = max(reserved for _, reserved in player.peaks)
    allocator.reset_peaks(max(before[0], peak_allocated), max(before[1], peak_reserved))
    found = tuple(
        Peak(name, *peak) for (_, name), peak in zip(marks, player.peaks[1:], strict=False)
    )
    return Replay(peak_allocated, peak_reserved, allocator.retries - before[2], oom, found)


class _Player:
    """Plays events. `peaks` are those from each mark to the next, `index` where memory ran out."""

    def __init__(
        self,
        events: list[tuple[int, int]],
        allocator: Allocator,
        marks: Sequence[tuple[int, str]],
        rounds: Sequence[Rounds],
    ) -> None:
        self.events = events
        self.allocator = allocator
        self.rounds = rounds
        self.bounds = [0, *(index for index, _ in marks), len(events) + 1]
        self.peaks: list[tuple[int, int]] = []  # (allocated, reserved), of the spans reached
        self.blocks: dict[int, int] = {}  # id -> block
        self.index = 0

    def play(self, begin: int, end: int, rounds: Sequence[Rounds], again: bool) -> None:
        """The events from begin to end, and all the rounds of the loops that end there."""
        for loop in rounds:
            if begin < loop.end <= end:
                self._stretch(begin, loop.end, again)
                begin = loop.end
                self._repeat(loop)
        self._stretch(begin, end, again)

    def _repeat(self, loop: Rounds) -> None:
        """The further rounds of a loop, those of loops inside it included."""
        inner = [
            other
            for other in self.rounds
            if loop.begin <= other.begin and other.end <= loop.end and other != loop
        ]
        before = None
        for _ in range(loop.count):
            state = self.allocator.state(), self.blocks.copy()
            if state == before:
                break
            before = state
            self.play(loop.begin, loop.end, inner, again=True)

    def _stretch(self, begin: int, end: int, again: bool) -> None:
        """Events without a loop's end among them, mark by mark."""
        bounds, peaks, allocator = self.bounds, self.peaks, self.allocator
        run = self._run_again if again else self._run
        span = max(bisect_left(bounds, begin + 1) - 1, 0)
        while span and bounds[span - 1] == begin and not again:
            span -= 1  # marks without an event of their own
        while span < len(bounds) - 1 and bounds[span] < end:
            if span == len(peaks):
                peaks.append((0, 0))
            allocator.reset_peaks(*(peaks[span] if again or begin > bounds[span] else (0, 0)))
            try:
                run(max(begin, bounds[span]), min(end, bounds[span + 1]))
            finally:
                peaks[span] = allocator.peak_allocated, allocator.peak_reserved
            span += 1

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
