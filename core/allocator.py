"""Places of any size in one region: best fit, coalescing."""

from __future__ import annotations

from bisect import bisect_left, insort


class Allocator:
    """Hands out ranges of `[start, start + capacity)`, rounded up to `grain` bytes.

    Allocations are not recorded: whoever frees a range states its size. Free ranges are never
    adjacent, and the smallest that fits is used.
    """

    def __init__(self, capacity: int, *, start: int = 0, grain: int = 4096) -> None:
        self.grain = grain
        self.capacity = max(0, capacity // grain * grain)
        self.free_bytes = 0
        self._size_at: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        self._starts: dict[int, set[int]] = {}
        self._sizes: list[int] = []
        self._insert(start, self.capacity)

    def rounded(self, size: int) -> int:
        """The bytes an allocation of `size` takes."""
        return -(-size // self.grain) * self.grain

    def allocate(self, size: int) -> int | None:
        """The offset of a free range of `size` bytes, or None if there is none."""
        size = self.rounded(size)
        fit = bisect_left(self._sizes, size)
        if fit == len(self._sizes):
            return None
        found = self._sizes[fit]
        starts = self._starts[found]
        offset = starts.pop()
        starts.add(offset)  # pop finds one in O(1); `_take` removes it everywhere
        self._take(offset)
        if found > size:
            self._insert(offset + size, found - size)
        return offset

    def free(self, offset: int, size: int) -> None:
        """Give back a range handed out by `allocate(size)`."""
        size = self.rounded(size)
        before = self._start_of_end.get(offset)
        after = self._size_at.get(offset + size)
        if after is not None:
            self._take(offset + size)
            size += after
        if before is not None:
            size += self._size_at[before]
            self._take(before)
            offset = before
        self._insert(offset, size)

    def _insert(self, offset: int, size: int) -> None:
        if size == 0:
            return
        self._size_at[offset] = size
        self._start_of_end[offset + size] = offset
        starts = self._starts.setdefault(size, set())
        if not starts:
            insort(self._sizes, size)
        starts.add(offset)
        self.free_bytes += size

    def _take(self, offset: int) -> None:
        size = self._size_at.pop(offset)
        del self._start_of_end[offset + size]
        starts = self._starts[size]
        starts.remove(offset)
        if not starts:
            del self._starts[size]
            del self._sizes[bisect_left(self._sizes, size)]
        self.free_bytes -= size
