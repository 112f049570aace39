"""Linked lists of small ints, kept in flat columns, and the memory of the evicted built on them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmcache.core.keys import ChunkKey

NONE = -1
"""No item, or no list."""

GHOSTS_AT_LEAST = 16
"""How many ghosts a policy may keep even when fewer entries are resident."""


def fit(column: array[int], index: int) -> None:
    """Make `column[index]` exist, at amortised O(1) and a sixteenth to spare; new cells are 0."""
    missing = index + 1 - len(column)
    if missing > 0:
        column.extend(array(column.typecode, bytes(missing * column.itemsize)))


def fingerprint(key: ChunkKey) -> int:
    """64 bits of `key`; two keys that share them may be taken for one another by a `Ghosts`."""
    return int.from_bytes(key[:8], "little")


class LinkedLists:
    """`num_lists` lists, oldest item first, with every item on one of them at most.

    Items index the columns, so they should be dense: whatever is below the largest costs 9 bytes.
    """

    def __init__(self, num_lists: int) -> None:
        self._oldest = [NONE] * num_lists
        self._newest = [NONE] * num_lists
        self._sizes = [0] * num_lists
        self._older = array("i")
        self._newer = array("i")
        # list number plus one, so that new cells are on no list
        self._owner = array("B")

    def __len__(self) -> int:
        return sum(self._sizes)

    def size(self, number: int) -> int:
        """How many items list `number` has."""
        return self._sizes[number]

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
        self._sizes[number] += 1

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
        self._sizes[number] -= 1
        return number

    def move(self, number: int, item: int) -> None:
        """Make `item`, which is on some list, the newest of list `number`."""
        self.remove(item)
        self.push(number, item)

    def after(self, number: int, item: int = NONE) -> int:
        """The next newer item of list `number` than `item`: the oldest after NONE, NONE at the end."""
        return self._oldest[number] if item == NONE else self._newer[item]

    def walk(self, number: int) -> Iterator[int]:
        """The items of list `number`, oldest first."""
        item = self.after(number)
        while item != NONE:
            yield item
            item = self.after(number, item)


class Ghosts:
    """Fingerprints of evicted keys, on `num_lists` lists, oldest first, at 25 bytes each.

    They are found by linear hashing: each slot that is added splits one bucket, so that growing
    costs the same every time and never stops the world.
    """

    def __init__(self, num_lists: int) -> None:
        self._lists = LinkedLists(num_lists)
        self._fingerprints = array("Q")
        # a bucket is a chain of slots: the first slot by bucket, the next one by slot; the unused
        # slots are one more chain
        self._first = array("i", [NONE])
        self._next = array("i")
        self._unused = NONE
        self._mask = 1

    def __len__(self) -> int:
        return len(self._lists)

    def size(self, number: int) -> int:
        """How many fingerprints list `number` has."""
        return self._lists.size(number)

    def push(self, number: int, fingerprint: int) -> None:
        """Remember `fingerprint` as the newest of list `number`."""
        slot = self._unused
        if slot == NONE:
            slot = self._add_slot()
        else:
            self._unused = self._next[slot]
        self._fingerprints[slot] = fingerprint
        self._lists.push(number, slot)
        self._chain(slot, self._bucket(fingerprint))

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
        # the upper half is not all there yet: what will go there waits in the lower one
        return bucket if bucket < len(self._first) else bucket & (self._mask >> 1)

    def _chain(self, slot: int, bucket: int) -> None:
        self._next[slot] = self._first[bucket]
        self._first[bucket] = slot

    def _add_slot(self) -> int:
        slot = len(self._next)
        self._next.append(NONE)
        self._fingerprints.append(0)
        self._split()
        return slot

    def _split(self) -> None:
        """Add a bucket and move there what waited for it."""
        bucket = len(self._first)
        if bucket > self._mask:
            self._mask += bucket
        waiting = bucket & (self._mask >> 1)
        slot = self._first[waiting]
        self._first[waiting] = NONE
        self._first.append(NONE)
        while slot != NONE:
            following = self._next[slot]
            self._chain(slot, self._bucket(self._fingerprints[slot]))
            slot = following

    def _forget(self, slot: int) -> int:
        bucket = self._bucket(self._fingerprints[slot])
        at = self._first[bucket]
        if at == slot:
            self._first[bucket] = self._next[slot]
        else:
            while self._next[at] != slot:
                at = self._next[at]
            self._next[at] = self._next[slot]
        self._next[slot] = self._unused
        self._unused = slot
        return self._lists.remove(slot)


__all__ = ["GHOSTS_AT_LEAST", "NONE", "Ghosts", "LinkedLists", "fingerprint", "fit"]
