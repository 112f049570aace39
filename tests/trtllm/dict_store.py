"""A cache that is a dictionary; what a minimal connector keeps its chunks in."""

from __future__ import annotations

import threading
from collections import defaultdict


class Store:
    """Chunks under (rank, group of layers, key). What is pinned is not evicted."""

    def __init__(self):
        self.chunks = {}
        self.shards = set()
        """Every rank's every group: a chunk is there when all of them have it."""
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
            if not all((*shard, key) in self.chunks for shard in shards or self.shards):
                break
            count += 1
        return count

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
