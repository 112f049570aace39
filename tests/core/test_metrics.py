"""The counters count what happened, once, and Prometheus can read them."""

from __future__ import annotations

import socket
import sys
import threading
import time
import urllib.request
from collections import Counter

import pytest
import rig
from ports import free_port
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lmcache.core.metrics import CacheCollector, Counters, Exporter, Source
from lmcache.core.receipts import Reason, Receipt

CHUNK = rig.CHUNK_TOKENS


def scrape(registry=REGISTRY):
    """Every sample of ours that is not zero: (name, engine, kind) to value."""
    return {
        (sample.name, sample.labels.get("engine"), sample.labels.get("kind", "")): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if sample.name.startswith("lmcache_") and sample.value
    }


class TestCounters:
    def test_labels_are_counted_apart_and_summed(self):
        counters = Counters()
        counters.add("damaged", label="disk")
        counters.add("damaged", 2, label="s3")
        counters.add("evictions")
        assert counters.copy() == {
            ("damaged", "disk"): 1,
            ("damaged", "s3"): 2,
            ("evictions", ""): 1,
        }
        assert (counters["damaged"], counters["evictions"], counters["refused"]) == (3, 1, 0)

    def test_a_name_nobody_knows_is_a_mistake(self):
        with pytest.raises(AssertionError, match="unknown counter evicted"):
            Counters().add("evicted")

    def test_a_lookup(self):
        counters = Counters()
        counters.looked_up(100, {"l1": 32, "disk": 16}, Reason.EVICTED)
        counters.looked_up(50, {"l1": 48}, Reason.NONE)
        assert counters.copy() == {
            ("lookups", "evicted"): 1,
            ("lookups", "none"): 1,
            ("lookup_tokens", ""): 150,
            ("hit_tokens", "l1"): 80,
            ("hit_tokens", "disk"): 16,
        }

    def test_every_reason_can_be_counted(self):
        counters = Counters()
        for reason in Reason:
            counters.looked_up(1, {}, reason)
        assert counters["lookups"] == len(Reason)
        assert len(counters.copy()) == len(Reason) + 1

    def test_a_copy_is_not_the_original(self):
        counters = Counters()
        counters.copy()["evictions", ""] = 5
        assert counters["evictions"] == 0

    def test_threads_lose_no_count(self):
        """Tier threads count while the scheduler does."""

        class Hesitant(Counter):
            def __getitem__(self, name):
                value = super().__getitem__(name)
                time.sleep(0)  # another thread's turn
                return value

        counters = Counters()
        counters.values = Hesitant()

        def count():
            for _ in range(500):
                counters.add("tier_errors", label="t0")

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counters["tier_errors"] == 2000

    def test_they_can_be_read_while_new_ones_appear(self):
        counters, failures, stop = Counters(), [], threading.Event()
        interval = sys.getswitchinterval()

        def read():
            try:
                while not stop.is_set():
                    assert counters["damaged"] <= 5000
            except BaseException as failure:
                failures.append(failure)

        sys.setswitchinterval(1e-6)
        try:
            reader = threading.Thread(target=read)
            reader.start()
            for turn in range(5000):
                counters.add("damaged", label=str(turn))
            stop.set()
            reader.join()
        finally:
            sys.setswitchinterval(interval)
        assert not failures
        assert counters["damaged"] == 5000


class TestCollector:
    @pytest.fixture
    def collector(self):
        return CacheCollector()

    @pytest.fixture
    def registry(self, collector):
        registry = CollectorRegistry()
        registry.register(collector)
        return registry

    def test_names_labels_and_values(self, collector, registry):
        counters = Counters()
        counters.add("stored_bytes", 2**40)
        counters.looked_up(10, {"l1": 4}, Reason.SHORT)
        collector.sources += (Source("e1", counters, lambda: {"free_bytes": 12.5}),)
        assert scrape(registry) == {
            ("lmcache_stored_bytes_total", "e1", ""): 2**40,
            ("lmcache_lookups_total", "e1", "short"): 1,
            ("lmcache_lookup_tokens_total", "e1", ""): 10,
            ("lmcache_hit_tokens_total", "e1", "l1"): 4,
            ("lmcache_free_bytes", "e1", ""): 12.5,
        }

    def test_every_counter_says_what_it_is(self, collector, registry):
        collector.sources += (Source("e1", Counters(), dict),)
        families = list(text_string_to_metric_families(generate_latest(registry).decode()))
        assert len(families) >= 14
        for family in families:
            assert family.type == "counter"
            assert family.documentation

    def test_what_never_happened_is_zero_and_not_absent(self, collector, registry):
        """Or an alert on it would never fire."""
        collector.sources += (Source("e1", Counters(), dict),)
        text = generate_latest(registry).decode()
        assert 'lmcache_damaged_total{engine="e1",kind=""} 0.0' in text

    def test_an_engine_may_be_called_anything(self, collector, registry):
        counters = Counters()
        counters.add("evictions")
        collector.sources += (Source('a"b\\c\nd{}', counters, dict),)
        assert scrape(registry) == {("lmcache_evictions_total", 'a"b\\c\nd{}', ""): 1}

    def test_several_engines_in_one_process(self, collector, registry):
        for name in ("e1", "e2"):
            counters = Counters()
            counters.add("evictions", int(name[1]))
            collector.sources += (Source(name, counters, lambda: {"chunks": 1.0}),)
        assert scrape(registry) == {
            ("lmcache_evictions_total", "e1", ""): 1,
            ("lmcache_evictions_total", "e2", ""): 2,
            ("lmcache_chunks", "e1", ""): 1,
            ("lmcache_chunks", "e2", ""): 1,
        }
        text = generate_latest(registry).decode()
        types = [line for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(types) == len(set(types)), "or Prometheus refuses the whole page"


class TestExporter:
    @pytest.fixture
    def decider(self, workshop):
        return workshop.decider(4)

    def test_it_shows_counters_and_gauges_until_it_is_closed(self, decider):
        exporter = Exporter("e1", decider, 0)
        chain = rig.chain(rig.tokens(CHUNK))
        [slot], _ = decider.reserve(chain, rig.geometry(), 0, CHUNK, tail=True)
        decider.commit(slot, rig.geometry())
        hit = decider.lookup("r", chain, rig.geometry(), CHUNK)
        decider.counters.looked_up(CHUNK, hit.receipt.by_tier, hit.receipt.reason)
        seen = scrape()
        assert seen["lmcache_hit_tokens_total", "e1", "l1"] == CHUNK
        assert seen["lmcache_chunks", "e1", ""] == seen["lmcache_leases", "e1", ""] == 1
        assert seen["lmcache_capacity_bytes", "e1", ""] == 4 * rig.SLOT
        assert seen["lmcache_free_bytes", "e1", ""] == 3 * rig.SLOT
        exporter.close()
        assert not any(engine == "e1" for _, engine, _ in scrape())

    def test_two_engines_in_one_process(self, workshop):
        exporters = [Exporter(f"e{n}", workshop.decider(n + 1), 0) for n in range(2)]
        seen = scrape()
        for number, exporter in enumerate(exporters):
            assert seen["lmcache_capacity_bytes", f"e{number}", ""] == (number + 1) * rig.SLOT
            exporter.close()

    def test_an_engine_comes_back_under_its_name(self, decider):
        for _ in range(3):
            Exporter("e1", decider, 0).close()

    def test_it_listens_on_loopback_only(self, decider):
        port = free_port()
        exporter = Exporter("e1", decider, port)
        try:
            server, _ = exporter._server
            assert server.server_address == ("127.0.0.1", port)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                assert b'lmcache_free_bytes{engine="e1"}' in answer.read()
        finally:
            exporter.close()
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", port)) != 0

    def test_a_port_that_is_taken_leaves_nothing_behind(self, decider):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(OSError, match="in use"):
                Exporter("e1", decider, taken.getsockname()[1])
        assert not any(engine == "e1" for _, engine, _ in scrape())
        Exporter("e1", decider, 0).close()


def test_a_receipt_is_a_value():
    one = Receipt(16, 32, Reason.EVICTED, {"l1": 16}, 100, 1.5)
    assert one == Receipt(16, 32, Reason.EVICTED, {"l1": 16}, 100, 1.5)
    assert one != Receipt(16, 32, Reason.NONE, {"l1": 16}, 100, 1.5)


def test_every_reason_says_what_it_means():
    assert len({reason.value for reason in Reason}) == len(Reason)
    for reason in Reason:
        assert reason.value
        assert reason.value == reason.value.strip()
        assert reason.value[0].islower()
        assert not reason.value.endswith(".")
