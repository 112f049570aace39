"""When a chunk is written to a slower tier."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from lmcache.core.keys import ChunkKey

REMEMBERED = 1 << 17
"""How many chunks have their sightings counted."""
_AFTER = re.compile(r"after-([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class WritePolicy:
    """`parse` makes one of what users write."""

    sightings: int = 1
    """How often a chunk must have been stored or found; 0 if it never is written."""
    at_eviction: bool = False
    """Not before it is among the next to leave memory."""

    def is_due(self, seen: int) -> bool:
        """Whether a chunk that has just come and was seen so often is written now."""
        return not self.at_eviction and 1 <= self.sightings <= seen

    @classmethod
    def parse(cls, text: str) -> WritePolicy:
        """Of `through`, `after-N`, `evict` or `never`. Raises `ConfigError` for all else."""
        if after := _AFTER.fullmatch(text):
            return cls(sightings=int(after[1]))
        known = {"through": cls(), "evict": cls(at_eviction=True), "never": cls(sightings=0)}
        if text not in known:
            raise ConfigError(
                f"option 'write': {text!r} is none of through, evict, never and after-N, such as"
                " after-2"
            )
        return known[text]


class Sightings:
    """Counts how often each chunk was seen lately. Not for several threads at once."""

    def __init__(self) -> None:
        self._counts: OrderedDict[ChunkKey, int] = OrderedDict()

    def count(self, key: ChunkKey) -> int:
        """How many there were."""
        return self._counts.get(key, 0)

    def add(self, key: ChunkKey) -> int:
        """One more; how many that makes."""
        count = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)
        return count
