"""Remembers the keys of recent sequences, for those that begin alike.

A conversation comes again with every turn, longer by a little: comparing its tokens with those of
the last turn costs a fiftieth of hashing them.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lmcache.core.chain import KeyChain

SEQUENCES = 256
TOKENS = 8 << 20
"""Of all remembered sequences together: 32 MiB, and as much again for their keys."""

_Start = tuple[bytes, int, bytes]


class ChainMemo:
    """The latest sequence of each beginning, up to a bound. Not for several threads at once."""

    def __init__(self) -> None:
        self._chains: OrderedDict[_Start, tuple[KeyChain, int]] = OrderedDict()
        self._tokens = 0

    def complete(self, chain: KeyChain) -> None:
        """Give a sequence that has just begun the keys that are known, and remember it."""
        tokens = chain.tokens
        if chain.inserts or not isinstance(tokens, array) or len(tokens) < chain.chunk_tokens:
            return
        first = tokens[: chain.chunk_tokens].tobytes()
        start = (chain.root, chain.page_tokens, first)
        if start in self._chains:
            like, size = self._chains.pop(start)
            self._tokens -= size
            chain.adopt(like, _common(tokens, like.tokens))
        self._chains[start] = chain, len(tokens)  # it may grow, but is counted as it is now
        self._tokens += len(tokens)
        while self._tokens > TOKENS or len(self._chains) > SEQUENCES:
            _, (_, size) = self._chains.popitem(last=False)
            self._tokens -= size


def _common(ours: array[int], theirs: object) -> int:
    """How many tokens two sequences share from the first on."""
    assert isinstance(theirs, array)
    length = min(len(ours), len(theirs))
    differ = np.frombuffer(ours, np.uint32, length) != np.frombuffer(theirs, np.uint32, length)
    first = int(differ.argmax())
    return first if length and differ[first] else length
