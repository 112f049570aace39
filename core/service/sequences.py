"""The token sequences that one engine has told the server of, by the engine's numbers for them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lmcache.core.chain import KeyChain
from lmcache.core.errors import ServiceError
from lmcache.core.keys import ChunkKey, Insert
from lmcache.core.service import wire
from lmcache.core.service.memo import grown, take_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmcache.core.geometry import Geometry
    from lmcache.core.service.memo import Memo

MAX_SEQUENCES = 65_536
MAX_KNOWN_TOKENS = 64 << 20
"""Of all its sequences together: 256 MiB."""


class UnknownError(ServiceError):
    """The engine speaks of something we do not know: it must begin anew."""


class Sequences(Mapping[int, KeyChain]):
    """What one engine has told, and what is known of it because some engine told it before."""

    def __init__(self, geometry: Geometry, memo: Memo[KeyChain]) -> None:
        """`memo` has the latest sequences of all engines."""
        self._geometry = geometry
        self._memo = memo
        self._chains: dict[int, KeyChain] = {}
        self.tokens = 0
        """Of all of them together."""

    def __len__(self) -> int:
        return len(self._chains)

    def __iter__(self) -> Iterator[int]:
        return iter(self._chains)

    def __getitem__(self, number: int) -> KeyChain:
        return self._chains[number]

    def told(self, number: int, more: wire.More | None) -> KeyChain:
        """The sequence, as it has grown. Raises `UnknownError` if some of it is lacking."""
        chain = self._chains.get(number)
        if more is not None:
            if more.at == 0:
                chain = self._begin(number, more)
            elif chain is None or len(chain.tokens) != more.at or more.like:
                raise UnknownError("the beginning of a sequence")
            self._append(chain, more.tokens)
        if chain is None:
            raise UnknownError("a sequence")
        return chain

    def take_keys(self, chain: KeyChain, *, keep: bool = True) -> None:
        """Give a sequence the keys that are known, and remember it if it is to be kept."""
        take_keys(self._memo, chain, keep=keep)

    def drop(self, number: int) -> None:
        """Nobody will ask about it again."""
        chain = self._chains.pop(number, None)
        self.tokens -= len(chain.tokens) if chain else 0

    # ----

    def _begin(self, number: int, more: wire.More) -> KeyChain:
        like = self._like(more.like) if more.like else None
        self.drop(number)
        if len(self._chains) >= MAX_SEQUENCES:
            raise UnknownError(f"more than {MAX_SEQUENCES} sequences")
        chain = KeyChain(
            ChunkKey(more.root),
            array("I"),
            page_tokens=self._geometry.page_tokens,
            pages_per_chunk=self._geometry.pages_per_chunk,
            inserts=[Insert(s.identifier, s.offset, s.length) for s in more.shown],
        )
        self._chains[number] = chain
        if more.like and like:
            self._grow(chain, memoryview(_tokens(like)).cast("B")[: 4 * more.like.tokens])
            if (like.root, like.inserts) == (chain.root, chain.inserts):
                chain.adopt(like, more.like.tokens)
        return chain

    def _like(self, like: wire.Like) -> KeyChain:
        chain = self._chains.get(like.sequence)
        if chain is None or len(chain.tokens) < like.tokens:
            raise UnknownError("the sequence that another is like")
        return chain

    def _append(self, chain: KeyChain, data: memoryview) -> None:
        if len(data) % 4:
            raise ServiceError(f"{len(data)} bytes are no whole tokens")
        self._grow(chain, wire.in_wire_order(data))

    def _grow(self, chain: KeyChain, tokens: memoryview) -> None:
        self._count(len(tokens) // 4)
        chain.tokens = grown(self._memo, chain, tokens)

    def _count(self, tokens: int) -> None:
        if self.tokens + tokens > MAX_KNOWN_TOKENS:
            raise UnknownError(f"more than {MAX_KNOWN_TOKENS} tokens in all")
        self.tokens += tokens


def _tokens(chain: KeyChain) -> array[int]:
    assert isinstance(chain.tokens, array)
    return chain.tokens
