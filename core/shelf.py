"""The slots of a slab: which chunks they hold, which goes next, and who is told.

The decider's lock guards all of it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.core.allocator import Allocator
from lmcache.core.index import ALL, Index, Slot
from lmcache.core.slab import CONTROL_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lmcache.core.eviction import EvictionPolicy
    from lmcache.core.keys import ChunkKey
    from lmcache.core.metrics import Counters

REMEMBERED = 65_536
"""How many evicted keys are remembered, to tell "evicted" from "never stored"."""


@dataclass
class Listeners:
    """Whoever keeps chunks elsewhere. Called under the decider's lock."""

    on_commit: Callable[[Slot], None] | None = None
    """Told of every complete slot that a slower tier lacks."""
    on_use: Callable[[Iterator[Slot]], None] | None = None
    """Told of those that were found, or that an engine would have stored again."""
    on_pressure: Callable[[Iterator[Slot]], None] | None = None
    """Told of those of them that are the next to be evicted and that late tiers lack, once."""
    late_from: int = ALL
    """How many tiers come before the first that is to hear of them."""

    def leave(self) -> None:
        """They want to hear of nothing any more."""
        self.on_commit = self.on_use = self.on_pressure = None


class Shelf:
    """Slots, complete ones with a policy that says which of them is the first to make room."""

    def __init__(
        self, slab_bytes: int, policy: EvictionPolicy, counters: Counters, *, keep: bool
    ) -> None:
        """With `keep` False a chunk leaves as soon as nobody pins it."""
        self.index = Index()
        self.listeners = Listeners()
        self.policy = policy
        self.keep = keep
        self.evicted: OrderedDict[ChunkKey, None] = OrderedDict()
        """The latest, to remember them."""
        self._allocator = Allocator(slab_bytes - CONTROL_BYTES, start=CONTROL_BYTES)
        self._counters = counters
        self._used: list[int] = []
        """Entries that were used and the policy has not been told of, in their order."""
        self._pressed = 0
        """Bytes placed since the listeners were told who leaves next."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes available to slots."""
        return self._allocator.capacity

    @property
    def free_bytes(self) -> int:
        """Bytes no slot occupies."""
        return self._allocator.free_bytes

    # ---- uses

    def used(self, entries: Iterable[int]) -> None:
        """Each of them in turn; the last becomes the last to be evicted."""
        self._used.extend(entries)

    def informed(self) -> EvictionPolicy:
        """The policy, told of every use so far."""
        if self._used:
            used, self._used = self._used, []
            self.policy.touch_all(used)
            if self.listeners.on_use:
                lacking = self.index.lacking
                self.listeners.on_use(self.index.slot(e, 0) for e in used if lacking[e])
        return self.policy

    def pin(self, entry: int) -> None:
        """Keep it in place until `unpin`."""
        self.index.pins[entry] += 1

    def unpin(self, entry: int) -> None:
        """Undo one `pin`."""
        if not self.keep:
            self.informed()  # whoever is told of its last use may pin it
        self.index.pins[entry] -= 1
        if not self.keep:
            self.drop_idle(entry)

    # ---- places

    def place(self, size: int) -> int | None:
        """Where there is room, evicting what must go; None if all the rest is pinned or taken."""
        offset = self._room_for(size)
        if offset is None:
            self._counters.add("refused")
        elif self.listeners.on_pressure:
            self._press(size)
        return offset

    def free(self, slot: Slot) -> None:
        """Nothing lies in a slot that was not complete."""
        self._allocator.free(slot.offset, slot.size)

    def add(self, slot: Slot, *, lacking: int) -> int:
        """A slot has become complete; its entry, not pinned yet."""
        self.evicted.pop(slot.key, None)
        entry = self.index.add(slot, lacking=lacking)
        self.informed().add(entry, slot.key)
        return entry

    def drop_idle(self, entry: int) -> bool:
        """Drop an entry unless it is pinned; whether it was dropped."""
        if self.index.pins[entry]:
            return False
        self._drop(entry, evicted=False)
        return True

    def clear(self) -> int:
        """Drop all that is not pinned; how many that was."""
        return sum(map(self.drop_idle, list(self.informed().victims())))

    # ----

    def _room_for(self, size: int) -> int | None:
        while (offset := self._allocator.allocate(size)) is None:
            victims = list(self._victims(size))
            gain = sum(self._allocator.rounded(self.index.size[entry]) for entry in victims)
            if not victims or self.free_bytes + gain < size:
                return None  # and nothing was evicted for nothing
            for entry in victims:
                self._drop(entry, evicted=True)
                self._counters.add("evictions")
        return offset

    def _victims(self, size: int) -> Iterator[int]:
        """The next entries to evict that together would hold `size` bytes."""
        found = 0
        for entry in self.informed().victims():
            if self.index.pins[entry]:
                continue
            yield entry
            found += self.index.size[entry]
            if found >= size:
                return

    def _drop(self, entry: int, *, evicted: bool) -> None:
        offset, size = self.index.offset[entry], self.index.size[entry]
        if evicted and self.listeners.on_pressure and self._is_due(entry):
            self._counters.add("tier_dropped")
        self.informed().remove(entry, evicted=evicted)
        key = self.index.remove(entry)
        self._allocator.free(offset, size)
        if evicted:
            self.evicted[key] = None
            if len(self.evicted) > REMEMBERED:
                self.evicted.popitem(last=False)

    def _press(self, size: int) -> None:
        """Every 64th part of the slab, tell of the next 8th to be evicted, once it is needed."""
        self._pressed += size
        if self._pressed < self.capacity_bytes // 64 or self.free_bytes > self.capacity_bytes // 8:
            return
        self._pressed = 0
        due = [entry for entry in self._victims(self.capacity_bytes // 8) if self._is_due(entry)]
        assert self.listeners.on_pressure
        self.listeners.on_pressure(self.index.slot(entry, 0) for entry in due)
        for entry in due:
            self.index.told[entry] = True

    def _is_due(self, entry: int) -> bool:
        """Whether a tier is to be given it before it leaves, and has not been told."""
        lacking, told = self.index.lacking[entry], self.index.told[entry]
        return lacking > self.listeners.late_from and not told
