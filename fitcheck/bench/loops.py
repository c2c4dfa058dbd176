"""The rounds of a long loop, from those that were traced: a decode step is like the one before it.

A rollout of 512 tokens repeats some thousand allocations 511 times, with keys and values one token
longer each time. Two rounds say how all of them go; reserved memory needs every one, since the
allocator keeps the holes that each round leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fitcheck.bench.tracer import Tracer

SMALL_POOL = 2**20  # kSmallSize: requests up to it never take from the segments of larger ones
WHOLE = 1_500_000  # more events than this are not worth the exact round at which a segment is taken


def alike(tracer: Tracer, bounds: Sequence[int]) -> bool:
    """Whether two rounds, given by three indices of events, allocate and free in one order."""
    first, second, end = bounds
    events = tracer.events
    return [size > 0 for size, _ in events[first:second]] == [
        size > 0 for size, _ in events[second:end]
    ]


def extend(tracer: Tracer, bounds: Sequence[int], count: int, window: Callable[[str], int]) -> None:
    """Append `count` rounds like the two that three indices of events bound.

    What grew from the one to the other goes on growing by as much, up to the tokens that a layer
    keeps: `window` of its module, 0 without one. What the last round freed of itself, or of the
    round before it, each new one frees likewise. In a very long loop the tensors of the small pool
    that a round makes and frees are left out of all but the last round, which is the largest: the
    pool's last 2 MiB are then seen at the end, not where they were taken.
    """
    if count < 1:
        return
    first, second, end = bounds
    events, made_by, where = tracer.events, tracer.made_by, tracer.where
    before, last = events[first:second], events[second:end]
    place_before = {name: place for place, (size, name) in enumerate(before) if size > 0}
    place_of = {name: place for place, (size, name) in enumerate(last) if size > 0}
    ended = {name for size, name in last if size == 0}
    ended_later = {place_before[name] for name in ended if name in place_before}
    whole = []
    for place, ((old, _), (size, name)) in enumerate(zip(before, last, strict=True)):
        growth = size - old
        kept = window(where[name]) if growth > 0 else 0
        rounds = max(0, kept - size // growth) if kept else count  # size / growth: tokens so far
        whole.append((place, size, growth, rounds, name))
    small = {
        name
        for _, size, growth, _, name in whole
        if name in ended and size > 0 and size + count * growth <= SMALL_POOL
    }
    brief = [step for step in whole if step[-1] not in small or count * len(whole) <= WHOLE]
    previous = traced = {place: name for name, place in place_of.items()}
    for n in range(1, count + 1):
        current: dict[int, int] = {}
        for place, size, growth, rounds, name in whole if n == count else brief:
            if size > 0:
                new = current[place] = len(made_by)
                events.append((size + min(n, rounds) * growth, new))
                made_by.append(made_by[name])
                where.append(where[name])
                if name not in ended and place not in ended_later:  # it stays, as the traced one
                    tracer.twins.setdefault(name, []).append(new)
            elif name in place_of:
                events.append((0, current[place_of[name]]))
            else:
                events.append((0, previous[place_before[name]]))
        previous = current
    for place in ended_later:  # alive now is the last round's, no longer the traced one's
        tracer.rename(traced[place], previous[place])
