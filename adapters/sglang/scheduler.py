"""What one rank asks of the cache. Runs on the thread of SGLang's scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lmcache.adapters.sglang.translate import tokens_of
from lmcache.core.engine import moves_for
from lmcache.core.keys import Identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.chain import KeyChain
    from lmcache.core.client import CacheClient
    from lmcache.core.decider import Hit
    from lmcache.core.joining import Joining
    from lmcache.core.keys import Namespace
    from lmcache.core.mover import Move

ASK_AGAIN_S = 0.001


@dataclass(frozen=True)
class Asked:
    """A prompt that is being looked up."""

    cache: CacheClient
    owner: str
    chain: KeyChain
    deadline: float
    """When slower tiers have been waited for long enough."""


@dataclass(frozen=True)
class Found:
    """What is leased for a prompt, from its first token on."""

    cache: CacheClient
    owner: str
    hit: Hit
    tokens: int
    """Whole chunks."""


class Copies(NamedTuple):
    """A step that the worker is to make."""

    attachment: int
    step: int
    moves: list[Move]
    total: int
    """Tokens of the request."""


class Scheduler:
    """Looks up and plans. Only whole chunks: SGLang frees slots in whole pages of its own."""

    def __init__(
        self, namespace: Namespace, joining: Joining[Any], chunk_size: int, patience_s: float
    ) -> None:
        """A lookup waits up to `patience_s` for slower tiers."""
        self._namespace = namespace
        self._joining = joining
        self._patience_s = patience_s
        attached: CacheClient | None = joining.current()
        self.chunk_tokens = attached.geometry.chunk_tokens if attached else chunk_size

    def ask(self, owner: str, token_ids: Sequence[int], salt: str = "") -> Asked | None:
        """Look the longest stored prefix up; None if there can be none, or is no cache."""
        cache: CacheClient | None = self._joining.current()
        stop = self.whole(len(token_ids))
        if cache is None or not stop:
            return None
        deadline = time.monotonic() + self._patience_s
        return Asked(cache, owner, self._chain(cache, token_ids[:stop], salt), deadline)

    def poll(self, asked: Asked) -> tuple[bool, Found | None]:
        """Whether that is over, and what is leased then."""
        hit = asked.cache.lookup(asked.owner, asked.chain, len(asked.chain.tokens))
        if hit is None and time.monotonic() < asked.deadline:
            return False, None
        tokens = self.whole(hit.tokens) if hit else 0
        if hit is None or not tokens:
            asked.cache.release(asked.owner, hit)
            return True, None
        return True, Found(asked.cache, asked.owner, hit, tokens)

    def give_up(self, asked: Asked) -> None:
        """Nobody wants the answer."""
        asked.cache.release(asked.owner, None)

    def find(self, owner: str, token_ids: Sequence[int]) -> Found | None:
        """Lease the longest stored prefix, waiting for slower tiers; None if there is none."""
        asked = self.ask(owner, token_ids)
        is_over, found = self.poll(asked) if asked else (True, None)
        while asked and not is_over:
            time.sleep(ASK_AGAIN_S)
            is_over, found = self.poll(asked)
        return found

    def release(self, found: Found) -> None:
        """It will not be loaded."""
        found.cache.release(found.owner, found.hit)

    def load(self, found: Found, slots: Sequence[int], first: int) -> Copies | None:
        """Have tokens from `first` on loaded into their `slots`; None if the lease has ended."""
        if found.cache is not self._joining.current() or not found.cache.keeps(
            found.hit, promised=True
        ):
            self.release(found)
            return None
        stop = min(found.tokens, len(slots))
        moves = moves_for(found.hit.slots, found.cache.geometry, slots, first, stop)
        step = found.cache.depart([], [found.hit])
        found.cache.release(found.owner, None)
        return Copies(found.cache.number, step, moves, len(slots))

    def store(
        self, token_ids: Sequence[int], slots: Sequence[int], start: int = 0, salt: str = ""
    ) -> Copies | None:
        """Have what is not stored yet of these tokens stored; None if that is nothing.

        The first `start` need not be, and have no slots.
        """
        cache: CacheClient | None = self._joining.current()
        stop = self.whole(len(token_ids))
        if cache is None or stop <= start:
            return None
        reserved, _ = cache.reserve(
            self._chain(cache, token_ids[:stop], salt), start, stop, tail=False
        )
        step = cache.depart(reserved, [])
        if not step:
            return None
        moves = moves_for(reserved, cache.geometry, slots, 0, stop)
        return Copies(cache.number, step, moves, len(token_ids))

    def whole(self, tokens: int) -> int:
        """As many as fill chunks."""
        return tokens // self.chunk_tokens * self.chunk_tokens

    def close(self) -> None:
        """Detach."""
        self._joining.close()

    # ----

    def _chain(self, cache: CacheClient, token_ids: Sequence[int], salt: str) -> KeyChain:
        return cache.chain(self._namespace, Identity(salt=salt), tokens_of(token_ids))
