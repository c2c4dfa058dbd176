"""Replay of a trace whose loops were traced once: as if every round were there."""

from __future__ import annotations

from random import Random

import pytest

from fitcheck.bench.allocator import MIB, Allocator
from fitcheck.bench.replay import Replay, Rounds, replay

Events = list[tuple[int, int]]
COUNT = 6


def round_of(random: Random, first: int, kept: int) -> Events:
    """Allocations of 1 to 90 MiB that are freed in any order, and one that the next round frees."""
    names = list(range(first, first + 12))
    events: Events = []
    live: list[int] = []
    while names or live:
        if names and (not live or random.random() < 0.6):
            events.append((random.randint(1, 90) * MIB, names[0]))
            live.append(names.pop(0))
        else:
            events.append((0, live.pop(random.randrange(len(live)))))
    return [*events, (3 * MIB, kept)]


def unrolled(events: Events, rounds: Rounds, kept: int) -> Events:
    """Every round in full; what one keeps goes when the next one has made its own."""
    body = events[rounds.begin : rounds.end]
    found = events[: rounds.end]
    last = kept
    for n in range(1, rounds.count + 1):
        found += [(size, name + 10_000 * n) for size, name in body]
        found.append((0, last))
        last = kept + 10_000 * n
    return found + [(size, last if name == kept else name) for size, name in events[rounds.end :]]


def outcome(result: Replay) -> tuple[int, int, bool]:
    return result.peak_allocated, result.peak_reserved, result.oom is None


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("expandable", [False, True])
def test_rounds_are_as_if_unrolled(seed: int, expandable: bool) -> None:
    random = Random(seed)
    events: Events = [(random.randint(1, 60) * MIB, name) for name in range(1000, 1010)]
    events += [(0, name) for name in range(1000, 1010, 2)]
    begin = len(events)
    events += round_of(random, 0, 99)
    rounds = [Rounds(begin, len(events), COUNT)]
    events += [(0, 99), (5 * MIB, 2000)]
    whole = unrolled(events, rounds[0], 99)
    most = replay(whole, Allocator()).peak_reserved
    for limit in (None, *range(most // 2, most, 8 * MIB)):
        allocators = [Allocator(limit, expandable_segments=expandable) for _ in range(2)]
        ours = replay(events, allocators[0], rounds=rounds)
        assert outcome(ours) == outcome(replay(whole, allocators[1]))


def test_a_later_round_runs_out_of_memory() -> None:
    """What each round leaves behind in the cache is too small for the next one's request."""
    events = [(30 * MIB, 1), (40 * MIB, 2), (0, 1), (0, 2)]
    failing = [(40 * MIB, 3), (0, 3), (90 * MIB, 4)]  # 4 stays: a second one does not fit
    rounds = [Rounds(4, 7, 1)]
    assert replay([*events, *failing], Allocator(100 * MIB)).oom is None
    assert replay([*events, *failing], Allocator(100 * MIB), rounds=rounds).oom in (4, 6)


def test_rounds_inside_rounds() -> None:
    """Each outer round has all of the inner ones: sizes that do not fit into each other's holes."""
    events = [(12 * MIB, 1), (0, 1), (22 * MIB, 2), (0, 2), (-1, 0)]
    rounds = [Rounds(2, 4, 3), Rounds(0, 5, 2)]
    seen: list[str] = []
    allocator = Allocator()
    allocator.on_segment(lambda action, address, size: seen.append(f"{action[8]}{size // MIB}"))
    replay(events, allocator, rounds=rounds)
    assert seen[:4] == ["a12", "a22", "f12", "f22"]
    assert len(seen) == 8  # the second outer round left the allocator as the first: no third


def test_equal_states_end_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    malloc = Allocator.malloc

    def counted(self: Allocator, size: int) -> int:
        nonlocal calls
        calls += 1
        return malloc(self, size)

    monkeypatch.setattr(Allocator, "malloc", counted)
    replay([(5 * MIB, 1), (0, 1)], Allocator(), rounds=[Rounds(0, 2, 10**9)])
    assert calls == 2
