"""The pools of the caching allocator: free blocks in best-fit order, and how a pool grows.

A block is known by its address. Free blocks are found by either end, so that neighbours merge in
constant time, and in best-fit order through one sorted list of integers. A pool takes memory from
the `Driver` in whole segments or, with expandable segments, page by page.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

# The place of a free block in best-fit order is one integer: size << SHIFT | address.
SHIFT = 64
ADDRESS = (1 << SHIFT) - 1


class Driver:
    """What cudaMalloc and cuMemMap hand out, up to a limit; bytes."""

    __slots__ = ("limit", "reserved", "peak", "on_segment")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = 0
        self.peak = 0
        self.on_segment: Callable[[str, int, int], None] | None = None

    def take(self, action: str, start: int, size: int) -> bool:
        """Whether there was room for `size` more bytes, which are then reserved."""
        reserved = self.reserved + size
        if reserved > self.limit:
            return False
        self.reserved = reserved
        self.peak = max(self.peak, reserved)
        if self.on_segment is not None:
            self.on_segment(action, start, size)
        return True

    def give_back(self, action: str, start: int, size: int) -> None:
        self.reserved -= size
        if self.on_segment is not None:
            self.on_segment(action, start, size)


class Ranges:
    """Ranges of addresses, found by their start or their end; neighbours merge as they come in."""

    __slots__ = ("size_at", "start_of")

    def __init__(self) -> None:
        self.size_at: dict[int, int] = {}  # start -> size
        self.start_of: dict[int, int] = {}  # end -> start

    def add(self, start: int, size: int) -> int:
        """Put a range in, merged with the ranges it touches; the start of the result."""
        end = start + size
        start = self.start_of.pop(start, start)
        end += self.size_at.pop(end, 0)
        self.size_at[start] = end - start
        self.start_of[end] = start
        return start

    def take(self, start: int) -> int:
        """Take the range at `start` out; its size."""
        size = self.size_at.pop(start)
        del self.start_of[start + size]
        return size


class Pool(Ranges):
    """The free blocks of the small or the large pool, and its segments."""

    __slots__ = ("driver", "order", "segments", "top", "page", "searches", "freed_at")

    def __init__(self, driver: Driver, base: int, page: int) -> None:
        super().__init__()
        self.driver = driver
        self.order: list[int] = []  # the free blocks as size << SHIFT | address, sorted
        self.segments: dict[int, int] = {}  # address -> size, oldest first
        self.top = base  # where the next segment goes
        self.page = page  # segments begin at a multiple of it, and do not touch each other
        self.searches = 0  # get_free_blocks_call_count: the clock of garbage collection
        self.freed_at: dict[int, int] = {}  # block -> the clock when it was freed

    def add(self, start: int, size: int) -> int:
        order, size_at = self.order, self.size_at
        end = start + size
        before = self.start_of.pop(start, 0)
        if before:
            del order[bisect_left(order, (start - before) << SHIFT | before)]
            start = before
        after = size_at.pop(end, 0)
        if after:
            del order[bisect_left(order, after << SHIFT | end)]
            end += after
        size_at[start] = size = end - start
        self.start_of[end] = start
        insort(order, size << SHIFT | start)
        return start

    def take(self, start: int) -> int:
        size = super().take(start)
        del self.order[bisect_left(self.order, size << SHIFT | start)]
        return size

    def best_fit(self, need: int) -> int:
        """The place in `order` of the smallest free block of at least `need` bytes.

        Ties go to the oldest segment, then to the lowest address.
        """
        return bisect_left(self.order, need << SHIFT)

    def grow(self, need: int, segment: int) -> tuple[int, int] | None:
        """A new block of at least `need` bytes, (address, size); None if the driver has no more."""
        start = self.free_address()
        if not self.driver.take("segment_alloc", start, segment):
            return None
        self.segments[start] = segment
        self.top = start + segment + self.page
        return start, segment

    def release(self, start: int) -> None:
        """Return the free segment at `start` to the driver."""
        self.driver.give_back("segment_free", start, self.take(start))
        del self.segments[start]

    def empty(self) -> None:
        """Return every segment without a live block; one with a live 512 bytes stays whole."""
        for key in list(self.order):
            start = key & ADDRESS
            if self.segments.get(start) == key >> SHIFT:
                self.release(start)

    def free_address(self) -> int:
        """Where the next segment begins."""
        return -(-self.top // self.page) * self.page


class ExpandablePool(Pool):
    """A pool whose segment is address space, mapped and unmapped a page at a time."""

    __slots__ = ("holes", "address_space")

    def __init__(self, driver: Driver, base: int, page: int, address_space: int) -> None:
        super().__init__(driver, base, page)
        self.holes = Ranges()  # address space that is not mapped
        self.address_space = address_space  # of one segment, bytes

    def best_fit(self, need: int) -> int:
        """A block counts as large as it could grow; go on while the next one is smaller so."""
        place = super().best_fit(need)
        while place + 1 < len(self.order) and self._reach(place + 1) < self._reach(place):
            place += 1
        return place

    def _reach(self, place: int) -> int:
        size = self.order[place] >> SHIFT
        return size + self.holes.size_at.get((self.order[place] & ADDRESS) + size, 0)

    def grow(self, need: int, segment: int) -> tuple[int, int] | None:
        """Map pages at the lowest spot with room, next to what is free there already.

        When the driver runs out midway, the holes filled before stay mapped, as in PyTorch.
        """
        start = self._spot(need)
        have = self.size_at.get(start, 0)
        while have < need:
            hole = start + have
            space = self.holes.size_at[hole]
            pages = -(-min(need - have, space) // self.page) * self.page
            if not self.driver.take("segment_map", hole, pages):
                return None
            self.holes.take(hole)
            if pages < space:
                self.holes.add(hole + pages, space - pages)
            self.add(hole, pages)
            have = self.size_at[start]
        return start, self.take(start)

    def _spot(self, need: int) -> int:
        """The lowest address from which free blocks and holes in a row hold `need` bytes."""
        for hole in sorted(self.holes.size_at):
            start = end = self.start_of.get(hole, hole)
            while end - start < need:
                size = self.size_at.get(end) or self.holes.size_at.get(end)
                if not size:
                    break
                end += size
            else:
                return start
        start = self.free_address()
        space = -(-max(self.address_space, need) // self.page) * self.page
        self.top = start + space + self.page
        self.holes.add(start, space)
        return start

    def empty(self) -> None:
        """Unmap the whole pages inside every free block."""
        for key in list(self.order):
            start = key & ADDRESS
            end = start + (key >> SHIFT)
            first = -(-start // self.page) * self.page
            last = end // self.page * self.page
            if first >= last:
                continue
            self.take(start)
            if start < first:
                self.add(start, first - start)
            if last < end:
                self.add(last, end - last)
            self.holes.add(first, last - first)
            self.driver.give_back("segment_unmap", first, last - first)
