"""What the leader knows of one request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache.core.chain import KeyChain
    from lmcache.core.client import CacheClient
    from lmcache.core.decider import Hit


@dataclass
class Tracked:
    """A request that may still be loaded or stored."""

    cache: CacheClient
    chain: KeyChain
    """Of its prompt, and of what it generates if that is stored too."""
    prompt: int
    """Tokens of the prompt."""
    local: int
    """Tokens that TensorRT-LLM has itself, or will have when it runs."""
    stop: int
    """Up to which token it was promised to have; `local` for nothing."""
    hit: Hit | None = None
    done: int = 0
    """Up to which token nothing need be stored."""
    sure: int = 0
    """The same, without what is lost if it is in no later pass."""
    blocks: list[int] = field(default_factory=list)
    has_begun: bool = False
    waits: bool = False
    """Whether TensorRT-LLM was told that it has to wait for what it is promised."""
    seen: int = 0
    """The number of the pass it was last in, or before which it was asked about."""
    since: float = field(default_factory=time.monotonic)
    """When it was asked about."""

    @property
    def promised(self) -> int:
        """Tokens that TensorRT-LLM counts on, and that no rank has been told to load yet."""
        return 0 if self.has_begun else self.stop - self.local

    @property
    def is_awaited(self) -> bool:
        """Whether it has not run yet, and must not be lost sight of until it does."""
        return not self.has_begun and (self.waits or self.promised > 0)
