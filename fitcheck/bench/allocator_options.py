"""What options of PYTORCH_CUDA_ALLOC_CONF that are off by default add to the caching allocator.

`roundup_power2_divisions`, `max_split_size_mb` and `garbage_collection_threshold`; expandable
segments are a kind of pool. Rules: c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp
of PyTorch 2.13.0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from fitcheck.bench.pool import ADDRESS, SHIFT, Pool

ROUND_INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: from 1 MiB to 32 GiB and above
FIRST_INTERVAL = 21  # bits of a size from 1 to 2 MiB


def division_table(divisions: int | Mapping[int | str, int]) -> tuple[int, ...]:
    """`roundup_power2_divisions` by size: entry i holds from 2**i MiB, the first one also below.

    As PyTorch reads a list [4:2,64:8,>:1]: sizes below the first key take its value, a size
    between keys takes none (0), ">" is everything above the key before it.
    """
    if isinstance(divisions, int):
        return (divisions,) * ROUND_INTERVALS
    table = [0] * ROUND_INTERVALS
    last = None
    for key, value in divisions.items():
        if key == ">":
            first = 0 if last is None else last + 1
            table[first:] = [value] * (ROUND_INTERVALS - first)
            continue
        place = min(int(key).bit_length() - 1, ROUND_INTERVALS - 1)
        if last is None:
            table[:place] = [value] * place
        table[place] = value
        last = place
    return tuple(table)


def divisions_of(size: int, table: tuple[int, ...]) -> int:
    """Into how many steps the power of two below `size` is divided, from `division_table`."""
    return table[min(max(size.bit_length() - FIRST_INTERVAL, 0), ROUND_INTERVALS - 1)]


def release_oversized(pool: Pool, need: int, max_split_size: int) -> bool:
    """Return free blocks of at least `max_split_size` to the driver; whether `need` may fit now.

    One that is large enough by itself if there is one, else the largest ones. These blocks are
    whole segments: larger ones are never split.
    """
    target = max(need, max_split_size)
    place = bisect_left(pool.order, target << SHIFT)
    if place < len(pool.order):
        pool.release(pool.order[place] & ADDRESS)
        return True
    released = 0
    while pool.order and released < target:
        size, start = pool.order[-1] >> SHIFT, pool.order[-1] & ADDRESS
        if size < max_split_size:
            break
        pool.release(start)
        released += size
    return released >= target


def collect_garbage(pool: Pool, threshold: int) -> None:
    """Return free segments of the large pool, those unused for longer than average first.

    Goes on until the process has no more than `threshold` bytes reserved, or nothing can go. The
    age of a segment is the number of searches of the pool since it was freed.
    """
    excess = pool.driver.reserved - threshold
    if excess <= 0:
        return
    ages = {
        start: pool.searches - pool.freed_at[start]
        for start, size in pool.segments.items()
        if pool.size_at.get(start) == size
    }
    released = True
    while excess > 0 and released and ages:
        average = sum(ages.values()) / len(ages)
        released = False
        for start, age in list(ages.items()):
            if age >= average:
                excess -= pool.size_at[start]
                pool.release(start)
                del ages[start]
                released = True
