"""Counters: plain integers where the work happens, collected when somebody asks."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from lmcache.core.decider import Decider
    from lmcache.core.receipts import Reason

_HELP = {
    "lookups": "Lookups by the reason they stopped",
    "lookup_tokens": "Tokens looked up",
    "hit_tokens": "Tokens found, by tier",
    "stored_tokens": "Tokens whose chunks were committed",
    "stored_bytes": "Bytes copied out of the engine",
    "load_failures": "Chunks whose copy into the engine failed",
    "store_failures": "Chunks whose copy out of the engine failed",
    "evictions": "Chunks evicted from the slab",
    "refused": "Chunks not stored because the slab was full of chunks in use",
    "damaged": "Objects of a slower tier that failed their check",
    "tier_written": "Chunks written to a slower tier",
    "tier_errors": "Failed calls of a slower tier",
    "tier_dropped": "Chunks not written: the queue or the tier, which is named, was full or failed",
    "expired_leases": "Leases that outlived their deadline",
}


class Counters:
    """Counts of one cache engine. Any thread may add to them."""

    def __init__(self) -> None:
        self.values: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1, label: str = "") -> None:
        """Add to a counter; `label` tells a tier or a reason apart."""
        assert name in _HELP, f"unknown counter {name}"
        with self._lock:
            self.values[name, label] += amount

    def looked_up(self, asked: int, hits: dict[str, int], reason: Reason) -> None:
        """Count one lookup."""
        self.add("lookups", label=reason.name.lower())
        self.add("lookup_tokens", asked)
        for tier, tokens in hits.items():
            self.add("hit_tokens", tokens, tier)

    def __getitem__(self, name: str) -> int:
        """The sum over all labels."""
        return sum(n for (found, _), n in self.copy().items() if found == name)

    def copy(self) -> dict[tuple[str, str], int]:
        """The counts at one instant."""
        with self._lock:
            return dict(self.values)


class Source(NamedTuple):
    """One engine's figures."""

    engine: str
    counters: Counters
    gauges: Callable[[], dict[str, float]]


class CacheCollector(Collector):
    """Presents the figures of all engines of a process to prometheus-client, each name once."""

    def __init__(self) -> None:
        self.sources: tuple[Source, ...] = ()
        """Replaced, never changed: a scrape may be reading it."""

    def describe(self) -> list[Metric]:
        """No names: the gauges are known only when somebody asks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        sources = self.sources
        counts = [(source.engine, source.counters.copy()) for source in sources]
        for name, help_text in _HELP.items():
            family = CounterMetricFamily(f"lmcache_{name}", help_text, labels=["engine", "kind"])
            for engine, values in counts:
                found = sorted((kind, value) for (of, kind), value in values.items() if of == name)
                for kind, value in found or [("", 0)]:
                    family.add_metric([engine, kind], value)
            yield family
        gauges: dict[str, GaugeMetricFamily] = {}
        for source in sources:
            for name, level in source.gauges().items():
                text = name.replace("_", " ")
                gauges.setdefault(
                    name, GaugeMetricFamily(f"lmcache_{name}", text, labels=["engine"])
                ).add_metric([source.engine], level)
        yield from gauges.values()


_COLLECTOR = CacheCollector()
_SHOWING = threading.Lock()


class Exporter:
    """Shows one engine's counters to Prometheus, and serves them on loopback if given a port."""

    def __init__(self, engine: str, decider: Decider, port: int) -> None:
        """With `port` 0 nothing listens. Raises `OSError` if the port is taken."""
        self._server = start_http_server(port, addr="127.0.0.1") if port else None
        self._source = Source(engine, decider.counters, decider.gauges)
        with _SHOWING:
            if not _COLLECTOR.sources:
                REGISTRY.register(_COLLECTOR)
            _COLLECTOR.sources += (self._source,)

    def close(self) -> None:
        """Stop showing them."""
        with _SHOWING:
            _COLLECTOR.sources = tuple(s for s in _COLLECTOR.sources if s is not self._source)
            if not _COLLECTOR.sources:
                REGISTRY.unregister(_COLLECTOR)
        if self._server:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
