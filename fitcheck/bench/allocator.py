"""PyTorch's CUDA caching allocator (2.13.0), modelled exactly for one stream.

Nothing here touches a GPU or imports torch. `malloc` and `free` follow the real allocator's rules
block by block, so `allocated` and `reserved` equal `torch.cuda.memory_allocated()` and
`torch.cuda.memory_reserved()` after every call:

    allocator = Allocator(limit_bytes=24 * 1024**3)
    block = allocator.malloc(5_000_000)  # takes a 20 MiB segment and hands out a piece of it
    allocator.free(block)                # the segment stays reserved
    allocator.empty_cache()              # ... until now

Rules: c10/core/AllocatorConfig.h, c10/cuda/CUDAAllocatorConfig.h, c10/cuda/CUDACachingAllocator.cpp
of PyTorch 2.13.0, checked against event traces recorded from that allocator. To replay one (a
trace of a step: replay.py):

    python -m fitcheck.bench.allocator TRACE.csv.gz [--limit BYTES] [--expandable] ...
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fitcheck.bench.allocator_options import (
    collect_garbage,
    division_table,
    divisions_of,
    release_oversized,
)
from fitcheck.bench.pool import ADDRESS, SHIFT, Driver, ExpandablePool, Pool

MIB = 1024 * 1024
MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_SIZE = MIB  # kSmallSize: the largest rounded size that the small pool serves
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer: what the small pool takes from the driver at a time
MIN_LARGE = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own ...
ROUND_LARGE = 2 * MIB  # kRoundLarge: ... of its size rounded up to a multiple of this
LARGE_SEGMENT = 20 * MIB  # large_segment_size: the segment of the requests below MIN_LARGE
MAX_NON_SPLIT_ROUNDING = 20 * MIB  # what a block above max_split_size may be too large

UNLIMITED = 1 << 62  # more bytes than any card has
UNKNOWN_CARD = 1 << 40  # sizes the address space of expandable segments when there is no limit

# Addresses are made up and never used twice: their order is the order of cudaMalloc, by which the
# real allocator breaks ties between free blocks of one size (BlockComparatorSizeCounterAddress).
# All are below 2**53, so that the JavaScript of PyTorch's memory viewer reads them exactly.
SMALL_BASE = 1 << 40
LARGE_BASE = 1 << 46


class OutOfMemory(Exception):
    """A request that fits neither a free block nor the card, the cache emptied. All in bytes.

    Attributes: `requested` as asked, `free` that the driver could still have given, `allocated`
    and `reserved` at that moment.
    """

    def __init__(self, requested: int, free: int, allocated: int, reserved: int) -> None:
        super().__init__(
            f"tried to allocate {requested} bytes; {free} free, "
            f"{allocated} allocated, {reserved} reserved"
        )
        self.requested = requested
        self.free = free
        self.allocated = allocated
        self.reserved = reserved


class Allocator:
    """The caching allocator of one card, one stream. All sizes in bytes.

    Args:
        limit_bytes: what the driver can give this process (card - context - others); None: endless.
        total_bytes: the whole card, of which `per_process_memory_fraction` is a part and after
            which expandable segments size their address space; default `limit_bytes`.
        expandable_segments, max_split_size, max_non_split_rounding, large_segment_size,
            garbage_collection_threshold: as in PYTORCH_CUDA_ALLOC_CONF, but in bytes, not MiB.
        roundup_power2_divisions: a number for all sizes, or {MiB: divisions, ">": divisions}.
        per_process_memory_fraction: `torch.cuda.set_per_process_memory_fraction`; collecting
            garbage needs one below 1, as in PyTorch.

    Attributes: `allocated` (sizes of the live blocks), `reserved` (bytes taken from the driver),
    their peaks since `reset_peaks`, `retries` (num_alloc_retries) and `ooms` (num_ooms).
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        *,
        total_bytes: int | None = None,
        expandable_segments: bool = False,
        max_split_size: int | None = None,
        max_non_split_rounding: int = MAX_NON_SPLIT_ROUNDING,
        large_segment_size: int = LARGE_SEGMENT,
        roundup_power2_divisions: int | Mapping[int | str, int] = 0,
        garbage_collection_threshold: float = 0.0,
        per_process_memory_fraction: float = 1.0,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.expandable_segments = expandable_segments
        self.max_split_size = UNLIMITED if max_split_size is None else max_split_size
        self.max_non_split_rounding = max_non_split_rounding
        self.large_segment_size = large_segment_size
        self.garbage_collection_threshold = garbage_collection_threshold
        self.divisions = division_table(roundup_power2_divisions)

        total = total_bytes or limit_bytes or UNKNOWN_CARD
        capped = per_process_memory_fraction < 1.0
        self._allowed = int(per_process_memory_fraction * total) if capped else UNLIMITED
        # Above this many reserved bytes a search that found nothing collects garbage first.
        collects = capped and garbage_collection_threshold > 0.0
        self._gc_above = int(garbage_collection_threshold * self._allowed) if collects else None
        self._rounds_up = any(d > 1 for d in self.divisions)
        self._releases_oversized = max_split_size is not None and not expandable_segments
        self._best_fit_only = not (expandable_segments or max_split_size or collects)

        self._driver = driver = Driver(UNLIMITED if limit_bytes is None else limit_bytes)
        self._small: Pool
        self._large: Pool
        if expandable_segments:
            space = total + total // 8
            self._small = ExpandablePool(driver, SMALL_BASE, SMALL_SEGMENT, space)
            self._large = ExpandablePool(driver, LARGE_BASE, large_segment_size, space)
        else:
            self._small = Pool(driver, SMALL_BASE, SMALL_SEGMENT)
            self._large = Pool(driver, LARGE_BASE, ROUND_LARGE)
        self._live: dict[int, int] = {}  # block -> size
        self.allocated = self.peak_allocated = 0
        self.retries = self.ooms = 0

    @property
    def reserved(self) -> int:
        return self._driver.reserved

    @property
    def peak_reserved(self) -> int:
        return self._driver.peak

    def reset_peaks(self, allocated: int = 0, reserved: int = 0) -> None:
        """As `torch.cuda.reset_peak_memory_stats`, or to earlier peaks that were higher."""
        self.peak_allocated = max(self.allocated, allocated)
        self._driver.peak = max(self._driver.reserved, reserved)

    def on_segment(self, report: Callable[[str, int, int], None]) -> None:
        """Call `report(action, address, size)` when memory is taken from the driver or returned.

        The actions are those of PyTorch's memory snapshots: segment_alloc, segment_free,
        segment_map and segment_unmap.
        """
        self._driver.on_segment = report

    def rounded(self, size: int) -> int:
        """The bytes a request of `size` needs: a multiple of 512, or of a power-of-2 division."""
        if self._rounds_up:
            divisions = divisions_of(size, self.divisions)
            if divisions > 1 and size > MIN_BLOCK * divisions:
                step = (1 << (size.bit_length() - 1)) // divisions
                return -(-size // step) * step
        return -(-size // MIN_BLOCK) * MIN_BLOCK

    def segment_size(self, rounded: int) -> int:
        """The bytes taken from the driver for a rounded request that no free block serves."""
        if rounded <= SMALL_SIZE:
            return SMALL_SEGMENT
        if rounded < MIN_LARGE:
            return self.large_segment_size
        return -(-rounded // ROUND_LARGE) * ROUND_LARGE

    def malloc(self, size: int) -> int:
        """Allocate `size` > 0 bytes: the block, an address. Raises OutOfMemory."""
        if size <= 0:
            raise ValueError(f"an allocation needs a size above 0, not {size}")
        need = self.rounded(size) if self._rounds_up else (size + 511) & -512
        is_small = need <= SMALL_SIZE
        pool = self._small if is_small else self._large
        order = pool.order
        if self._best_fit_only:
            place = bisect_left(order, need << SHIFT)  # pool.best_fit(need), without the call
        else:
            place = self._acceptable(pool, need)
        if place < len(order):
            best = order.pop(place)
            block = best & ADDRESS
            have = best >> SHIFT
            del pool.size_at[block]
            end = block + have
            del pool.start_of[end]
        else:
            block, have = self._new_block(pool, need, size)
            end = block + have

        rest = have - need
        if rest and (
            is_small  # no smaller rest than 512 bytes exists: sizes are multiples of it
            or (rest > SMALL_SIZE and need < self.max_split_size)
            or self.expandable_segments
        ):
            tail = block + need
            pool.size_at[tail] = rest
            pool.start_of[end] = tail
            insort(order, rest << SHIFT | tail)
            have = need
        self._live[block] = have
        self.allocated = allocated = self.allocated + have  # an unsplit rest counts as allocated
        if allocated > self.peak_allocated:
            self.peak_allocated = allocated
        return block

    def free(self, block: int) -> None:
        """Free a block that `malloc` returned; it stays reserved. KeyError if it is not live."""
        size = self._live.pop(block)
        self.allocated -= size
        pool = self._small if block < LARGE_BASE else self._large
        start = pool.add(block, size)
        if self._gc_above is not None:
            pool.freed_at[start] = pool.searches

    def empty_cache(self) -> None:
        """Return every segment without a live block to the driver; of expandable ones, pages."""
        self._large.empty()
        self._small.empty()

    def blocks(self) -> Iterator[tuple[int, int, bool]]:
        """(address, size, live) of every block, by address; what touches shares a segment."""
        blocks = [(block, size, True) for block, size in self._live.items()]
        for pool in (self._small, self._large):
            blocks += [(start, size, False) for start, size in pool.size_at.items()]
        return iter(sorted(blocks))

    def state(self) -> Any:
        """All that decides what happens from here on; equal states have equal futures."""
        clock = 0 if self._gc_above is None else self._large.searches
        orders = self._small.order.copy(), self._large.order.copy()
        return self.reserved, clock, orders, self._live.copy()

    def _acceptable(self, pool: Pool, need: int) -> int:
        """The place of the best fit in the pool's order, or its length if none is acceptable."""
        pool.searches += 1
        nothing = len(pool.order)
        place = pool.best_fit(need)
        if place == nothing:
            return nothing
        have = pool.order[place] >> SHIFT
        if need < self.max_split_size:  # large blocks are kept for large requests, whole
            return nothing if have >= self.max_split_size else place
        return nothing if have >= need + self.max_non_split_rounding else place

    def _new_block(self, pool: Pool, need: int, requested: int) -> tuple[int, int]:
        """A block from the driver, as (address, size), after all there is to try."""
        if self._gc_above is not None and not self.expandable_segments:
            collect_garbage(self._large, self._gc_above)
        block = self._grow(pool, need)
        if (
            block is None
            and self._releases_oversized
            and release_oversized(pool, need, self.max_split_size)
        ):
            block = self._grow(pool, need)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._grow(pool, need)
        if block is None:
            self.ooms += 1
            free = max(self._driver.limit - self.reserved, 0)
            raise OutOfMemory(requested, free, self.allocated, self.reserved)
        return block

    def _grow(self, pool: Pool, need: int) -> tuple[int, int] | None:
        """One attempt to take more from the driver."""
        segment = self.segment_size(need)
        if self.reserved + segment > self._allowed:
            return None
        return pool.grow(need, segment)


if __name__ == "__main__":
    from fitcheck.bench.allocator_check import main

    raise SystemExit(main())
