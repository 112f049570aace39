"""Linked lists of small ints, kept in flat columns, and the memory of the evicted built on them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lmcache.core.keys import ChunkKey

NONE = -1
"""No item, or no list."""

GHOSTS_AT_LEAST = 16
"""How many ghosts a policy may keep even when fewer entries are resident."""

_SPARE = 64


def fit(column: array[int], index: int) -> None:
    """Make `column[index]` exist, at amortised O(1) and a sixteenth to spare; new cells are 0."""
    missing = index - len(column) + _SPARE
    if missing >= _SPARE:
        column.frombytes(bytes(missing * column.itemsize))


def fingerprint(key: ChunkKey) -> int:
    """64 bits of `key`. Keys that share them are taken for one another, which costs a bad guess."""
    return int.from_bytes(key[:8], "little")


class LinkedLists:
    """Lists of ints, oldest first, with every int on one of them at most.

    The ints index the columns, so they should be dense: 9 bytes for each up to the largest.
    """

    def __init__(self, num_lists: int) -> None:
        self.sizes = [0] * num_lists
        """How many items each list has. For reading only."""
        self._oldest = [NONE] * num_lists
        self._newest = [NONE] * num_lists
        self._older = array("i")
        self._newer = array("i")
        # list number plus one, so that a new cell is on no list
        self._owner = array("B")

    def push(self, number: int, item: int) -> None:
        """Make `item`, which is on no list, the newest of list `number`."""
        if item >= len(self._owner):
            for column in (self._older, self._newer, self._owner):
                fit(column, item)
        assert not self._owner[item], f"{item} is on a list already"
        newest = self._newest[number]
        if newest == NONE:
            self._oldest[number] = item
        else:
            self._newer[newest] = item
        self._older[item] = newest
        self._newer[item] = NONE
        self._newest[number] = item
        self._owner[item] = number + 1
        self.sizes[number] += 1

    def remove(self, item: int) -> int:
        """Take `item` off its list and return which one it was."""
        number = self._owner[item] - 1
        assert number != NONE, f"{item} is on no list"
        older, newer = self._older[item], self._newer[item]
        if older == NONE:
            self._oldest[number] = newer
        else:
            self._newer[older] = newer
        if newer == NONE:
            self._newest[number] = older
        else:
            self._older[newer] = older
        self._owner[item] = 0
        self.sizes[number] -= 1
        return number

    def move(self, number: int, item: int) -> None:
        """Make `item`, which is on some list, the newest of list `number`."""
        newest, newer = self._newest[number], self._newer[item]
        if self._owner[item] != number + 1 or newer == NONE:
            self.remove(item)
            self.push(number, item)
            return
        older = self._older[item]  # in place: this is what every chunk of every hit costs
        if older == NONE:
            self._oldest[number] = newer
        else:
            self._newer[older] = newer
        self._older[newer], self._newer[newest] = older, item
        self._older[item], self._newer[item] = newest, NONE
        self._newest[number] = item

    def renew(self, number: int, items: Iterable[int]) -> None:
        """`move` each of them in turn; all are on list `number`.

        Those that follow each other on the list go as one: it costs a sixth of moving each.
        """
        first = last = NONE
        newer = self._newer
        for item in items:
            if last != NONE and newer[last] != item:
                self._move_run(number, first, last)
                last = NONE
            if last == NONE:
                first = item
            last = item
        if last != NONE:
            self._move_run(number, first, last)

    def _move_run(self, number: int, first: int, last: int) -> None:
        """Make what lies between `first` and `last`, which is as new or newer, the newest."""
        older, newer = self._older[first], self._newer[last]
        if newer == NONE:
            return
        if older == NONE:
            self._oldest[number] = newer
        else:
            self._newer[older] = newer
        newest = self._newest[number]
        self._older[newer], self._newer[newest] = older, first
        self._older[first], self._newer[last] = newest, NONE
        self._newest[number] = last

    def after(self, number: int, item: int = NONE) -> int:
        """The next newer item of list `number`: the oldest after NONE, NONE after the newest."""
        return self._oldest[number] if item == NONE else self._newer[item]

    def walk(self, number: int) -> Iterator[int]:
        """The items of list `number`, oldest first."""
        item = self.after(number)
        while item != NONE:
            yield item
            item = self.after(number, item)


class Ghosts:
    """Lists of fingerprints of evicted keys, oldest first, at 25 bytes each.

    They are found by linear hashing: each slot that is added splits one bucket, so that growing
    costs the same every time and never stops the world.
    """

    def __init__(self, num_lists: int) -> None:
        self._lists = LinkedLists(num_lists)
        self.sizes = self._lists.sizes
        """How many fingerprints each list has. For reading only."""
        self._fingerprints = array("Q")
        # slots are chained by bucket, and the unused ones in a chain of their own
        self._first = array("i", [NONE])
        self._next = array("i")
        self._unused = NONE
        self._mask = 1

    def push(self, number: int, fingerprint: int) -> None:
        """Remember `fingerprint` as the newest of list `number`."""
        slot = self._unused
        if slot == NONE:
            slot = self._add_slot()
        else:
            self._unused = self._next[slot]
        bucket = self._bucket(fingerprint)
        self._fingerprints[slot] = fingerprint
        self._next[slot] = self._first[bucket]
        self._first[bucket] = slot
        self._lists.push(number, slot)

    def pop(self, fingerprint: int) -> int:
        """Forget `fingerprint` and return which list it was on, NONE if on none."""
        slot = self._first[self._bucket(fingerprint)]
        while slot != NONE:
            if self._fingerprints[slot] == fingerprint:
                return self._forget(slot)
            slot = self._next[slot]
        return NONE

    def drop(self, number: int) -> None:
        """Forget the oldest of list `number`, which is not empty."""
        self._forget(self._lists.after(number))

    def _bucket(self, fingerprint: int) -> int:
        bucket = fingerprint & self._mask
        # who belongs in a bucket that is still to be split off waits in the one it will come from
        return bucket if bucket < len(self._first) else bucket & (self._mask >> 1)

    def _add_slot(self) -> int:
        self._split()
        self._fingerprints.append(0)
        self._next.append(NONE)
        return len(self._next) - 1

    def _split(self) -> None:
        new = len(self._first)
        if new > self._mask:
            self._mask += new
        half = self._mask >> 1
        first, following = self._first, self._next
        slot, stay, leave = first[new & half], NONE, NONE
        while slot != NONE:
            after = following[slot]
            if self._fingerprints[slot] & (half + 1):
                following[slot], leave = leave, slot
            else:
                following[slot], stay = stay, slot
            slot = after
        first[new & half] = stay
        first.append(leave)

    def _forget(self, slot: int) -> int:
        following = self._next
        bucket = self._bucket(self._fingerprints[slot])
        at = self._first[bucket]
        if at == slot:
            self._first[bucket] = following[slot]
        else:
            while following[at] != slot:
                at = following[at]
            following[at] = following[slot]
        following[slot] = self._unused
        self._unused = slot
        return self._lists.remove(slot)


__all__ = ["GHOSTS_AT_LEAST", "NONE", "Ghosts", "LinkedLists", "fingerprint", "fit"]
