"""What an engine has told the server of its sequences, and how it says more with few bytes."""

from __future__ import annotations

import sys
import weakref
from array import array
from collections import deque
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lmcache.core.service import wire
from lmcache.core.service.memo import Memo, beginning, common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.chain import KeyChain

MEMO_TOKENS = 2 << 20
"""8 MiB in the engine."""


class _Told:
    """A sequence that the server knows, for as long as a request or the memo refers to it."""

    def __init__(self, number: int, tokens: array[int]) -> None:
        self.number = number
        self.tokens = tokens


class Told:
    """The sequences of one session. Not for several threads at once."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._of: WeakKeyDictionary[KeyChain, _Told] = WeakKeyDictionary()
        self._memo: Memo[_Told] = Memo(MEMO_TOKENS)
        self._ended: deque[int] = deque()

    def tell(self, chain: KeyChain, stop: int) -> tuple[int, wire.More | None]:
        """The number of a sequence and what the server lacks of its first `stop` tokens.

        To be sent in the order of the calls: it counts as told from now on.
        """
        told = self._of.get(chain)
        if told is None:
            return self._begin(chain, stop)
        at = len(told.tokens)
        if at >= stop:
            return told.number, None
        tokens = _packed(chain.tokens, at, stop)
        told.tokens.extend(tokens)
        return told.number, _more(chain, tokens, at=at)

    def ended(self) -> list[int]:
        """The numbers of those that nobody will ask about again; each is given out once."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _begin(self, chain: KeyChain, stop: int) -> tuple[int, wire.More]:
        tokens = _packed(chain.tokens, 0, stop)
        told = self._of[chain] = _Told(next(self._numbers), tokens)
        weakref.finalize(told, self._ended.append, told.number).atexit = False
        start = beginning(chain, tokens)
        like = self._memo.swap(start, told, len(tokens)) if start else None
        if like is None:
            return told.number, _more(chain, tokens)
        known = common(tokens, like.tokens)
        return told.number, _more(chain, tokens[known:], like=wire.Like(like.number, known))


def _more(
    chain: KeyChain, tokens: array[int], *, at: int = 0, like: wire.Like | None = None
) -> wire.More:
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return wire.More(
        root=chain.root,
        shown=[wire.Shown(i.identifier, i.offset, i.length) for i in chain.inserts],
        at=at,
        like=like,
        tokens=memoryview(tokens).cast("B"),
    )


def _packed(tokens: Sequence[int], start: int, stop: int) -> array[int]:
    packed = array("I")
    if isinstance(tokens, list):  # half the time of `extend`, and a slice would cost as much again
        packed.fromlist(tokens[start:] if start else tokens)
        del packed[stop - start :]
    else:
        packed.extend(tokens[start:stop])
    return packed
