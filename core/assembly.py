"""Puts a decider and its tiers together from a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.core.decider import Decider
from lmcache.core.memory_limit import clamp_budget, memory_limit
from lmcache.core.metrics import Counters
from lmcache.core.slab import Slab
from lmcache.core.tiers import Tier, Tiers

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend
    from lmcache.core.config import Config
    from lmcache.core.eviction import EvictionPolicy

GIB = 1 << 30


def assemble(
    config: Config,
    create_policy: Callable[[str, int], EvictionPolicy],
    open_backend: Callable[[str], StorageBackend],
) -> tuple[Decider, Tiers]:
    """Reserve the slab and open every tier of `config`; what fails to open raises its own error."""
    size = clamp_budget(int(config.max_local_cpu_size * GIB), memory_limit())
    policy = create_policy(config.cache_policy, size)
    opened: list[Tier] = []
    try:
        for url in config.tier_urls():
            opened.append(Tier(url.partition("://")[0], open_backend(url)))
        decider = Decider(
            Slab.create(size),
            policy,
            counters=Counters(),
            keep=config.local_cpu,
            lease_s=config.pin_timeout_sec,
        )
    except BaseException:
        for tier in opened:
            tier.backend.close()
        raise
    return decider, Tiers(decider, opened, fetch_timeout_s=config.fetch_timeout_ms / 1e3)
