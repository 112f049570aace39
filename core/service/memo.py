"""Remembers recent sequences, for those that begin alike.

A conversation comes again with every turn, longer by a little: comparing its tokens with those of
the last turn costs a fiftieth of hashing them, and a tenth of sending them.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from lmcache.core.chain import KeyChain

SEQUENCES = 256

Item = TypeVar("Item")


class Beginning(NamedTuple):
    """What sequences that may share chunks have in common."""

    root: bytes
    page_tokens: int
    first: bytes
    """The tokens of the first chunk."""


def beginning(chain: KeyChain, tokens: array[int]) -> Beginning | None:
    """Of a sequence of these tokens; None if it is too short, or has inserts."""
    if chain.inserts or len(tokens) < chain.chunk_tokens:
        return None
    return Beginning(chain.root, chain.page_tokens, tokens[: chain.chunk_tokens].tobytes())


class Memo(Generic[Item]):
    """The latest item of each beginning, up to a bound. Not for several threads at once."""

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._items: OrderedDict[Beginning, tuple[Item, int]] = OrderedDict()
        self._tokens = 0

    def get(self, start: Beginning) -> Item | None:
        """The item of that beginning, None if there is none."""
        return self._items.get(start, (None, 0))[0]

    def swap(self, start: Beginning, item: Item, tokens: int) -> Item | None:
        """Keep `item`, of so many tokens, and return the one it takes the place of."""
        old, size = self._items.pop(start, (None, 0))
        self._items[start] = item, tokens  # it may grow, but is counted as it is now
        self._tokens += tokens - size
        while self._tokens > self._most_tokens or len(self._items) > SEQUENCES:
            _, (_, size) = self._items.popitem(last=False)
            self._tokens -= size
        return old


def take_keys(memo: Memo[KeyChain], chain: KeyChain, *, keep: bool = True) -> None:
    """Give a sequence the keys that are known, and remember it if it is to be kept."""
    tokens = chain.tokens
    assert isinstance(tokens, array)
    start = beginning(chain, tokens)
    if start is None:
        return
    like = memo.swap(start, chain, len(tokens)) if keep else memo.get(start)
    if like and not chain.has_keys(len(tokens)):
        assert isinstance(like.tokens, array)
        chain.adopt(like, common(tokens, like.tokens))


def grown(memo: Memo[KeyChain], chain: KeyChain, more: memoryview) -> array[int]:
    """The tokens of a sequence and `more` behind them, as bytes.

    If a known sequence is the same so far, these are its own: fresh memory costs more than to
    compare. So nothing may be changed in place.
    """
    at, size = len(chain.tokens), 4 * chain.chunk_tokens
    assert isinstance(chain.tokens, array)
    start = beginning(chain, chain.tokens if at else array("I", bytes(more[:size])))
    like = memo.get(start) if start else None
    if like and len(like.tokens) == at + len(more) // 4:
        theirs = memoryview(like.tokens).cast("B")  # type: ignore[arg-type]
        ours = memoryview(chain.tokens).cast("B")
        if _are_same(theirs[: 4 * at], ours) and _are_same(theirs[4 * at :], more):
            assert isinstance(like.tokens, array)
            return like.tokens
    tokens = chain.tokens[:]
    tokens.frombytes(more)
    return tokens


def _are_same(one: memoryview, other: memoryview) -> bool:
    return np.array_equal(np.frombuffer(one, np.uint32), np.frombuffer(other, np.uint32))


def common(ours: array[int], theirs: array[int]) -> int:
    """How many tokens two sequences share from the first on."""
    if ours is theirs:
        return len(ours)
    length = min(len(ours), len(theirs))
    differ = np.frombuffer(ours, np.uint32, length) != np.frombuffer(theirs, np.uint32, length)
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
