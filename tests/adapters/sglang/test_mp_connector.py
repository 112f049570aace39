"""SGLang's connector to a server, on real sockets, called in the order of its radix tree."""

from __future__ import annotations

import time

import pytest
import rig
import torch
from house import House
from pool import MODEL, Pool, finish, mapping, tokens

from lmcache.adapters.sglang.worker import Loading
from lmcache.core.errors import ConfigError
from lmcache.core.tiers import Tiers
from lmcache.integration.sglang.multi_process_adapter import LMCacheMPConnector
from lmcache.integration.sglang.sglang_adapter import LoadMetadata, StoreMetadata
from lmcache.integration.sglang.utils import lmcache_get_config

CHUNK = 16


@pytest.fixture
def house(later):
    made = rig.decider(64)
    later(made.slab.close)
    tiers = Tiers(made, [])
    later(tiers.close)
    house = House(made, tiers, chunk_size=CHUNK, modes=("engine_driven", "lmcache_driven"))
    later(house.close)
    return house


@pytest.fixture
def join(house, settings, later):
    def join(pool, *, page_size=1, tp_size=1, rank=0, **keys):
        host, _, port = house.endpoint.removeprefix("tcp://").rpartition(":")
        path = settings(mp_host=host, mp_port=int(port), **keys)
        config = lmcache_get_config(path)
        connector = LMCacheMPConnector(
            page_size=page_size,
            host=config.mp_host,
            port=config.mp_port,
            sgl_config=MODEL,
            tp_size=tp_size,
            rank=rank,
            k_pool=pool.k,
            v_pool=pool.v,
            tp_group=None,
            config_file=path,
        )
        later(connector.close)
        return connector

    return join


def admit(connector, pool, prompt, have=(), rid="r"):
    """What SGLang does about a request that it schedules; the slots of all that is there then."""
    found = connector.lookup_kv(prompt, rid)
    assert found % CHUNK == 0
    assert found <= len(prompt)
    if found <= len(have):
        connector.release_pending(rid)
        return list(have)
    pad, fresh = len(have) % CHUNK, pool.take(found - len(have))
    came = connector.retrieve_kv(
        LoadMetadata(
            token_ids=prompt,
            slot_mapping=mapping(len(have), fresh),
            offset=len(have) - pad,
            prefix_pad=pad,
            request_id=rid,
        )
    )
    assert came in (0, found - len(have) + pad)
    if not came:
        connector.release_pending(rid)
        pool.give(fresh)
        return list(have)
    return [*have, *fresh]


def end(connector, prompt, slots, rid="r"):
    connector.store_kv(
        StoreMetadata(
            last_node=None,
            token_ids=prompt,
            kv_indices=torch.tensor(slots, dtype=torch.int32),
            offset=0,
            request_id=rid,
        )
    )
    connector.end_session(rid)


def store(connector, pool, prompt):
    slots = pool.take(len(prompt))
    pool.compute(prompt, slots)
    end(connector, prompt, slots)
    pool.give(slots)


def right(pool, prompt, slots):
    return all(pool.wrong(prompt, slots, layer) == [] for layer in range(pool.layers))


@pytest.mark.parametrize("mode", ["engine_driven", "lmcache_driven"])
class TestSharing:
    @pytest.mark.parametrize("have", [0, 5, 16, 37])
    def test_what_one_computed_another_loads(self, house, join, mode, have):
        extra = f'{{"lmcache.mp.mp_transfer_mode": "{mode}"}}'
        pools, prompt = [Pool(seed=1), Pool(seed=2)], tokens(100)
        one, two = (join(pool, extra_config=extra) for pool in pools)
        store(one, pools[0], prompt)
        house.wait_idle()
        own = pools[1].take(have)
        pools[1].compute(prompt, own)
        slots = admit(two, pools[1], prompt[:99], own)
        assert len(slots) == 96
        assert right(pools[1], prompt, slots)
        end(two, prompt[:99], [*slots, *pools[1].take(3)])
        house.wait_idle()

    def test_a_failed_load_is_recomputed_and_nothing_is_held(self, house, join, mode, monkeypatch):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool, extra_config=f'{{"lmcache.mp.mp_transfer_mode": "{mode}"}}')
        store(connector, pool, prompt)
        house.wait_idle()
        monkeypatch.setattr(Loading, "whole", lambda self: False)
        assert admit(connector, pool, prompt) == []
        connector.end_session("r")
        house.wait_idle()


class TestRequests:
    def test_one_that_is_asked_about_again(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        store(connector, pool, prompt)
        for _ in range(5):
            assert connector.lookup_kv(prompt, "r") == 48
        assert len(house.decider.leases) == 1
        connector.end_session("r")
        house.wait_idle()

    def test_one_that_never_comes_back(self, house, join):
        """SGLang says nothing of a request that is aborted while it waits."""
        pool, prompt = Pool(), tokens(50)
        connector = join(pool, pin_timeout_sec=1)
        store(connector, pool, prompt)
        assert connector.lookup_kv(prompt, "lost") == 48
        time.sleep(1.1)
        assert connector.lookup_kv(prompt, "next") == 48
        assert list(connector._found) == ["next"]
        connector.end_session("next")
        house.wait_idle()

    @pytest.mark.parametrize("rid", ["HEALTH_CHECK_1", ""])
    def test_one_that_nobody_looked_up(self, house, join, rid):
        pool, prompt = Pool(), tokens(1)
        connector = join(pool)
        connector.release_pending(rid)
        end(connector, prompt, pool.take(1), rid)
        assert connector.lookup_kv(tokens(40), "") == 0
        assert connector.errors == 0
        house.wait_idle()

    def test_a_load_without_a_lookup(self, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        store(connector, pool, prompt)
        said = LoadMetadata(token_ids=prompt, slot_mapping=mapping(0, pool.take(48)), offset=0)
        before = pool.snapshot()
        assert connector.retrieve_kv(said) == 0
        assert torch.equal(pool.snapshot(), before)

    def test_a_lease_that_has_ended(self, house, join, monkeypatch):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        store(connector, pool, prompt)
        client = connector._cache.joining.current()
        monkeypatch.setattr(client, "keeps", lambda hit, promised: False)
        assert admit(connector, pool, prompt) == []
        connector.end_session("r")
        house.wait_idle()

    def test_reset_lets_go(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        store(connector, pool, prompt)
        connector.lookup_kv(prompt, "r")
        connector.reset()
        house.wait_idle()
        assert connector.lookup_kv(prompt, "r") == 48


class TestServers:
    def test_a_server_that_is_gone_costs_nothing(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        store(connector, pool, prompt)
        assert connector.lookup_kv(prompt, "r") == 48
        house.close()
        started = time.monotonic()
        assert admit(connector, pool, prompt, rid="s") == []
        said = LoadMetadata(
            token_ids=prompt, slot_mapping=mapping(0, pool.take(48)), offset=0, request_id="r"
        )
        connector.retrieve_kv(said)
        store(connector, pool, prompt)
        assert time.monotonic() - started < 3
        assert connector.errors == 0

    def test_no_server_at_all(self, house, join):
        house.close()
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        assert connector.chunk_size() == CHUNK
        store(connector, pool, prompt)
        assert admit(connector, pool, prompt) == []

    def test_its_chunks_are_whole_pages(self, join):
        assert join(Pool(slots=383), page_size=16).chunk_size() == CHUNK
        with pytest.raises(ConfigError, match="chunks of 16 tokens are not whole pages of 12"):
            join(Pool(), page_size=12)

    def test_its_chunk_size_counts(self, house, join):
        with pytest.raises(ConfigError, match="the engine was told to use 32"):
            join(Pool(), chunk_size=32)

    def test_an_error_in_a_lookup_is_a_miss(self, join, errors):
        pool, asked = Pool(), []
        connector = join(pool)
        connector._ranks.least = lambda number: asked.append(number) or number
        connector._cache.scheduler.find = None
        assert connector.lookup_kv(tokens(50), "r") == 0
        assert asked == [0]
        assert len(errors) == 1


class TestRanks:
    def test_ranks_share_nothing_but_what_they_agree_on(self, house, join):
        pools, prompt = [Pool(rank=rank) for rank in range(2)], tokens(50)
        one, two = (join(pool, tp_size=2, rank=rank) for rank, pool in enumerate(pools))
        for connector in (one, two):
            connector._ranks.least = lambda number: number
        store(one, pools[0], prompt)
        assert two.lookup_kv(prompt, "r") == 0
        store(two, pools[1], prompt)
        for connector, pool in ((one, pools[0]), (two, pools[1])):
            slots = admit(connector, pool, prompt)
            assert len(slots) == 48
            assert right(pool, prompt, slots)
            connector.end_session("r")
        house.wait_idle()

    def test_what_the_others_lack_is_let_go(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        store(connector, pool, prompt)
        connector._ranks.least = lambda number: 0
        assert connector.lookup_kv(prompt, "r") == 0
        house.wait_idle()

    def test_less_is_loaded_if_the_others_have_less(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(pool)
        store(connector, pool, prompt)
        connector._ranks.least = lambda number: min(number, 32)
        slots = admit(connector, pool, prompt)
        assert len(slots) == 32
        assert right(pool, prompt, slots)
        connector.end_session("r")
        house.wait_idle()


class TestSettings:
    def test_what_sglang_reads(self, settings):
        config = lmcache_get_config(settings(mp_host="127.0.0.1", mp_port=5556))
        assert (config.mp_host, config.mp_port) == ("127.0.0.1", 5556)
        assert config.endpoint == "tcp://127.0.0.1:5556"
        assert lmcache_get_config(settings()).mp_port == 5555
        assert lmcache_get_config(settings(mp_host="tcp://h")).endpoint == "tcp://h:5555"

    def test_the_environment_names_the_file(self, settings, monkeypatch):
        monkeypatch.setenv("LMCACHE_CONFIG_FILE", settings(mp_port=7))
        assert lmcache_get_config("").mp_port == 7
        assert lmcache_get_config(settings(mp_port=8)).mp_port == 8

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"mp_port": "x"}, "mp_port is 'x', expected int"),
            ({"extra_config": "3"}, "extra_config is 3, expected a mapping"),
            ({"extra_config": '{"lmcache.mp.mq_timout": 3}'}, "unknown key lmcache.mp.mq_timout"),
            ({"extra_config": '{"lmcache.mp.mp_transfer_mode": "x"}'}, "mp_transfer_mode is 'x'"),
            ({"mp_hots": "x"}, "unknown configuration key 'mp_hots'"),
        ],
    )
    def test_what_is_not_understood(self, settings, said, message):
        with pytest.raises(ConfigError, match=message):
            lmcache_get_config(settings(**said))


def test_a_store_of_another_pool_is_not_found(house, join):
    """Its layers have other bytes."""
    prompt = tokens(50)
    one, two = Pool(), Pool(layers=2)
    store(join(one), one, prompt)
    assert join(two).lookup_kv(prompt, "r") == 0


def test_finish_is_the_same_for_both_generations(house, join):
    pool, prompt = Pool(), tokens(50)
    connector = join(pool)
    slots = pool.take(50)
    pool.compute(prompt, slots)
    finish(connector, prompt, slots)
    assert connector.lookup_kv(prompt, "r") == 48
