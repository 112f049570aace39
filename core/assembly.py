"""Puts a decider and its tiers together from a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lmcache.core.decider import Decider
from lmcache.core.memory_limit import clamp_budget, memory_limit
from lmcache.core.metrics import Counters
from lmcache.core.packing import Packed
from lmcache.core.slab import Slab
from lmcache.core.tier import DEPTH, Tier
from lmcache.core.tiers import Tiers
from lmcache.core.urls import parse_count, take_options
from lmcache.core.write_policy import WritePolicy

if TYPE_CHECKING:
    from lmcache.core.backend import StorageBackend
    from lmcache.core.codec import Codec
    from lmcache.core.config import Config
    from lmcache.core.eviction import EvictionPolicy

GIB = 1 << 30
MOST_DEPTH = 256


class Offers(Protocol):
    """What users may choose from by name; the plugin manager is one."""

    def create_policy(self, name: str, capacity_bytes: int) -> EvictionPolicy:
        """The eviction policy of that name."""

    def create_codec(self, name: str) -> Codec:
        """The codec of that name."""

    def open_backend(self, url: str) -> StorageBackend:
        """The backend at `url`, open."""


def open_tier(url: str, offers: Offers) -> Tier:
    """The tier at `url`, which reads its own options and leaves the backend the rest."""
    location, options = take_options(url, ("codec", "depth", "write"))
    codec = offers.create_codec(options["codec"]) if "codec" in options else None
    depth = parse_count("depth", options.get("depth", str(DEPTH)), MOST_DEPTH)
    write = WritePolicy.parse(options.get("write", "through"))
    backend = offers.open_backend(location)
    name = url.partition("://")[0]
    if codec is None:
        return Tier(name, backend, depth, write)
    return Tier(name, Packed(backend, codec), depth, write, exact=codec.lossless)


def assemble(config: Config, offers: Offers) -> tuple[Decider, Tiers]:
    """Reserve the slab and open every tier of `config`; what fails to open raises its own error."""
    size = clamp_budget(int(config.max_local_cpu_size * GIB), memory_limit())
    policy = offers.create_policy(config.cache_policy, size)
    opened: list[Tier] = []
    try:
        for url in config.tier_urls():
            opened.append(open_tier(url, offers))
        decider = Decider(
            Slab.create(size),
            policy,
            counters=Counters(),
            keep=config.local_cpu,
            lease_s=config.pin_timeout_sec,
            patience_s=config.lookup_timeout_ms / 1e3,
        )
    except BaseException:
        for tier in opened:
            tier.backend.close()
        raise
    return decider, Tiers(decider, opened, fetch_timeout_s=config.fetch_timeout_ms / 1e3)
