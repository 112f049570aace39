"""A cache that is a dictionary; what a minimal connector keeps its chunks in."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

WAKES_S = 0.01
"""What a slower tier takes."""


class Store:
    """Chunks under (rank, group of layers, key). What is pinned is not evicted."""

    def __init__(self):
        self.chunks = {}
        self.shards = set()
        """Every rank's every group: a chunk is there when all of them have it."""
        self._asleep = {}
        """What is in a slower tier, and when it will be here if that is under way."""
        self._pins = defaultdict(set)
        self._lock = threading.Lock()

    def put(self, shard, key, data):
        with self._lock:
            self.chunks.setdefault((*shard, key), data)

    def get(self, shard, key):
        with self._lock:
            return self.chunks.get((*shard, key))

    def hits(self, keys, shards=None):
        """How many chunks of a prefix all shards have."""
        count = 0
        for key in keys:
            if not all(self._is_here((*shard, key)) for shard in shards or self.shards):
                break
            count += 1
        return count

    def doze(self):
        """Have all there is in a slower tier only."""
        with self._lock:
            self._asleep = dict.fromkeys(self.chunks)

    def fetch(self, keys):
        """Begin to bring what is in a slower tier; whether some of it is still to come."""
        now, coming = time.monotonic(), False
        with self._lock:
            for name in [name for name in self._asleep if name[-1] in set(keys)]:
                due = self._asleep[name] = self._asleep[name] or now + WAKES_S
                coming |= now < due
                if now >= due:
                    del self._asleep[name]
        return coming

    def _is_here(self, name):
        return name in self.chunks and name not in self._asleep

    def pin(self, holder, keys):
        """Keep what is there of a prefix until all shards let go; how many chunks that is."""
        with self._lock:
            count = self.hits(keys)
            for shard in self.shards:
                self._pins[holder, shard] = set(keys[:count])
            return count

    def unpin(self, holder, shards=None):
        with self._lock:
            for shard in shards or self.shards:
                self._pins.pop((holder, shard), None)

    @property
    def pinned(self):
        """(shard, key) of what may not go."""
        return {(*shard, key) for (_, shard), keys in self._pins.items() for key in keys}

    def evict(self):
        """Lose everything that may be lost."""
        with self._lock:
            pinned = self.pinned
            self.chunks = {name: data for name, data in self.chunks.items() if name in pinned}

    def lose(self, rank):
        """Lose all of one rank's, pinned or not, as a store that fails does."""
        with self._lock:
            self.chunks = {name: data for name, data in self.chunks.items() if name[0] != rank}
