"""What an engine has told the server of its sequences, and how it says more with few bytes."""

from __future__ import annotations

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
SAMPLES = 64
BEGINNING = 8_192
"""Tokens that show whether anything is stored of a sequence that begins like no other."""


class _Told:
    """A sequence that the server knows, for as long as a request or the memo refers to it."""

    def __init__(self, number: int, tokens: array[int], *, guessed: bool = False) -> None:
        self.number = number
        self.tokens = tokens
        self.ahead = tokens
        """These and more, to be told when the server asks for them."""
        self.guessed = guessed


class Told:
    """The sequences of one session. Not for several threads at once."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._of: WeakKeyDictionary[KeyChain, _Told] = WeakKeyDictionary()
        self._memo: Memo[_Told] = Memo(MEMO_TOKENS)
        self._ended: deque[int] = deque()

    def tell(
        self, chain: KeyChain, stop: int, *, brief: bool = False
    ) -> tuple[int, wire.More | None]:
        """The number of a sequence and what the server lacks of its first `stop` tokens.

        To be sent in the order of the calls: it counts as told from now on. If it is to be `brief`,
        no more than the beginning is told, or what it begins with is guessed, until `confirm`: the
        server can begin while we compare.
        """
        told = self._of.get(chain)
        if told is None or told.guessed:
            like = self._likely(chain, stop) if brief else None
            if like:
                return self._guess(chain, stop, like)
            return self._begin(chain, self._enough(chain, stop) if brief else stop)
        at = len(told.tokens)
        if at >= stop or brief:
            return told.number, None
        told.tokens = _grown(told.ahead, chain.tokens, stop)
        if len(told.ahead) < stop:
            told.ahead = told.tokens
        self._remember(chain, told)
        return told.number, _more(chain, told.tokens, at)

    def confirm(self, chain: KeyChain, stop: int) -> bool:
        """Whether what was told is so; if not, none of it counts as told.

        If not all of the first `stop` tokens were, they are made ready to be.
        """
        told = self._of[chain]
        if not told.guessed:
            told.ahead = _grown(told.ahead, chain.tokens, stop)
            return True
        if _packed(chain.tokens, 0, len(told.tokens)) != told.tokens:
            del self._of[chain]
            return False
        told.guessed = False
        self._remember(chain, told)
        return True

    def ended(self) -> list[int]:
        """The numbers of those that nobody will ask about again; each is given out once."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    # ----

    def _begin(self, chain: KeyChain, stop: int) -> tuple[int, wire.More]:
        told = self._new(chain, _packed(chain.tokens, 0, stop))
        like = self._remember(chain, told)
        if like is None:
            return told.number, _more(chain, told.tokens)
        known = common(told.tokens, like.tokens)
        return told.number, _more(chain, told.tokens, like=wire.Like(like.number, known))

    def _guess(self, chain: KeyChain, stop: int, like: _Told) -> tuple[int, wire.More]:
        known = len(like.tokens)
        tokens = like.tokens + _packed(chain.tokens, known, stop)
        told = self._new(chain, tokens, guessed=True)
        return told.number, _more(chain, tokens, like=wire.Like(like.number, known))

    def _enough(self, chain: KeyChain, stop: int) -> int:
        """How much to tell of a sequence at first: what begins like another may well be stored."""
        few = max(BEGINNING, chain.chunk_tokens)
        if stop < 2 * few:
            return stop
        start = beginning(chain, _packed(chain.tokens, 0, chain.chunk_tokens))
        return stop if start and self._memo.get(start) else few

    def _likely(self, chain: KeyChain, stop: int) -> _Told | None:
        """What the sequence seems to begin with, by some of its tokens."""
        start = beginning(chain, _packed(chain.tokens, 0, min(stop, chain.chunk_tokens)))
        like = self._memo.get(start) if start else None
        if like is None or not len(like.tokens) <= stop <= len(chain.tokens):
            return None
        theirs, ours = like.tokens, chain.tokens
        places = range(len(theirs) - 1, 0, -(len(theirs) // SAMPLES + 1))
        return like if all(theirs[place] == ours[place] for place in places) else None

    def _new(self, chain: KeyChain, tokens: array[int], *, guessed: bool = False) -> _Told:
        told = self._of[chain] = _Told(next(self._numbers), tokens, guessed=guessed)
        weakref.finalize(told, self._ended.append, told.number).atexit = False
        return told

    def _remember(self, chain: KeyChain, told: _Told) -> _Told | None:
        """Keep it for those that begin alike; returns the one that was kept until now."""
        start = beginning(chain, told.tokens)
        return self._memo.swap(start, told, len(told.tokens)) if start else None


def _more(
    chain: KeyChain, tokens: array[int], at: int = 0, *, like: wire.Like | None = None
) -> wire.More:
    """What follows the first `at` of the sequence's tokens, or those that are like another's."""
    start = like.tokens if like else at
    return wire.More(
        root=chain.root,
        shown=[wire.Shown(i.identifier, i.offset, i.length) for i in chain.inserts],
        at=at,
        like=like,
        tokens=wire.in_wire_order(memoryview(tokens)[start:].cast("B")),
    )


def _packed(tokens: Sequence[int], start: int, stop: int) -> array[int]:
    packed = array("I")
    if isinstance(tokens, list):  # half the time of `extend`, and a slice would cost as much again
        packed.fromlist(tokens if start == 0 and stop >= len(tokens) else tokens[start:stop])
    else:
        packed.extend(tokens[start:stop])
    return packed


def _grown(packed: array[int], tokens: Sequence[int], stop: int) -> array[int]:
    """The first `stop` tokens. Not in place: what is being sent may still be read."""
    if len(packed) >= stop:
        return packed if len(packed) == stop else packed[:stop]
    if 2 * len(packed) < stop <= len(tokens):  # to join them costs more than all of it
        return _packed(tokens, 0, stop)
    return packed + _packed(tokens, len(packed), stop)
