"""The eviction policies that come with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import EvictionSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.core.eviction import EvictionPolicy


def _lru(_capacity_bytes: int) -> EvictionPolicy:
    from lmcache.core.eviction.lru import LRUPolicy

    return LRUPolicy()


def _s3fifo(_capacity_bytes: int) -> EvictionPolicy:
    from lmcache.core.eviction.s3fifo import S3FIFOPolicy

    return S3FIFOPolicy()


def _arc(_capacity_bytes: int) -> EvictionPolicy:
    from lmcache.core.eviction.arc import ARCPolicy

    return ARCPolicy()


@hookimpl
def lmcache_eviction_policies() -> Iterable[EvictionSpec]:
    yield EvictionSpec("LRU", _lru, "what was used least recently leaves first")
    yield EvictionSpec("S3FIFO", _s3fifo, "what was used once leaves soon, the rest queues")
    yield EvictionSpec("ARC", _arc, "balances recency and frequency by what it evicted too early")
