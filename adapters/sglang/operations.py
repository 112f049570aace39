"""What SGLang from 0.5.21 on holds of a lookup, a load and a store until they have ended."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lmcache.adapters.sglang.metadata import LMCacheExternalFlow
    from lmcache.adapters.sglang.scheduler import Asked, Found


@dataclass
class Lookup:
    """A prompt that is looked up, or what is leased for it."""

    request_id: str
    asked: Asked | None
    found: Found | None = None
    lock_start: int = 0
    """The first token that SGLang may still load."""
    can_hit: bool = True
    """Whether the prompt fills a chunk, which all ranks see alike."""
    flow: LMCacheExternalFlow | None = field(default=None, repr=False)
    """What SGLang keeps of the request."""


@dataclass
class Operation:
    """A load or a store, which has ended when its future has."""

    request_id: str
    start: int
    """The first token it is about."""
    future: Future[bool] = field(default_factory=Future)
    result: bool | None = None
    """Whether it ended well on every rank, once SGLang has asked."""

    def query(self) -> bool:
        """Whether it has ended here."""
        return self.future.done()


@dataclass
class Load(Operation):
    """Slots that are being filled."""

    local_hit_tokens: int = 0
    device_indices: torch.Tensor | None = None
