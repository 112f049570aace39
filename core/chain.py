"""The chunk keys of one token sequence, computed when asked for and kept."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from lmcache.core.keys import next_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lmcache.core.keys import ChunkKey, Insert


class KeyChain:
    """Keys of the full chunks of `tokens`, and of the tail chunks that stop at a page boundary.

    `tokens` is kept, not copied, and may grow at its end; it must not change otherwise. Positions
    count tokens; a chunk is `pages_per_chunk` pages of `page_tokens` tokens.
    """

    def __init__(
        self,
        root: ChunkKey,
        tokens: Sequence[int],
        *,
        page_tokens: int,
        pages_per_chunk: int,
        inserts: Sequence[Insert] = (),
    ) -> None:
        self.tokens = tokens
        self.page_tokens = page_tokens
        self.pages_per_chunk = pages_per_chunk
        self.chunk_tokens = page_tokens * pages_per_chunk
        self.inserts = tuple(inserts)
        self._keys: list[ChunkKey] = [root]
        self._tails: dict[tuple[int, int], ChunkKey] = {}

    @property
    def root(self) -> ChunkKey:
        """The key before the first token."""
        return self._keys[0]

    def key(self, chunk: int) -> ChunkKey:
        """The key of full chunk number `chunk`, counted from 0."""
        keys = self._keys
        while len(keys) <= chunk + 1:
            at = len(keys) - 1
            keys.append(self._next(at, self.chunk_tokens))
        return keys[chunk + 1]

    def full(self, stop: int, first: int = 0) -> Iterable[ChunkKey]:
        """The keys of full chunks from number `first` on before token position `stop`.

        Each is computed when it is taken.
        """
        count = stop // self.chunk_tokens
        known = self._keys[first + 1 : count + 1]
        coming = range(max(first, len(self._keys) - 1), count)
        return chain(known, map(self.key, coming)) if coming else known

    def has_keys(self, stop: int) -> bool:
        """Whether the keys of all full chunks before token position `stop` are computed."""
        return len(self._keys) > stop // self.chunk_tokens

    def adopt(self, other: KeyChain, common: int) -> None:
        """Take over what `other` knows of the first `common` tokens, which both share.

        Root, inserts and page size must be the same.
        """
        count = common // self.chunk_tokens + 1
        if other.chunk_tokens == self.chunk_tokens and len(self._keys) < count:
            self._keys = other._keys[:count]

    def tail(self, chunk: int, pages: int) -> ChunkKey:
        """The key of the first `pages` pages of chunk `chunk`, fewer than a full chunk."""
        known = self._tails.get((chunk, pages))
        if known is None:
            self.key(chunk - 1)
            known = self._tails[chunk, pages] = self._next(chunk, pages * self.page_tokens)
        return known

    def part(self, chunk: int, pages: int) -> ChunkKey:
        """The key of the first `pages` pages of chunk `chunk`, full or not."""
        return self.key(chunk) if pages == self.pages_per_chunk else self.tail(chunk, pages)

    def pages_in(self, chunk: int, stop: int) -> int:
        """How many whole pages of chunk `chunk` lie before token position `stop`."""
        whole = (stop - chunk * self.chunk_tokens) // self.page_tokens
        return max(0, min(whole, self.pages_per_chunk))

    def _next(self, chunk: int, length: int) -> ChunkKey:
        start = chunk * self.chunk_tokens
        tokens = self.tokens[start : start + length]
        assert len(tokens) == length, "key asked for beyond the last token"
        return next_key(self._keys[chunk], tokens, start, self.inserts)
