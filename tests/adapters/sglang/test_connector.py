"""SGLang's in-process connector, called in the order in which its radix tree calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import rig
import torch
from pool import MODEL, Pool, finish, forward, mapping, match, tokens
from ports import free_port

from lmcache.adapters.sglang import translate
from lmcache.adapters.sglang.settings import load_settings
from lmcache.adapters.sglang.worker import Loading
from lmcache.core.errors import ConfigError, LayoutError
from lmcache.core.exchange import exchange_namespace
from lmcache.integration.sglang.sglang_adapter import LMCacheLayerwiseConnector, LoadMetadata

HERE = Path(__file__).resolve().parent


@pytest.fixture
def make(settings, later):
    def make(pool, *, tp_size=1, rank=0, tp_group=None, **keys):
        connector = LMCacheLayerwiseConnector(
            sgl_config=MODEL,
            tp_size=tp_size,
            rank=rank,
            k_pool=pool.k,
            v_pool=pool.v,
            config_file=settings(**{"use_layerwise": True, **keys}),
            tp_group=tp_group,
        )
        later(connector.close)
        return connector

    return make


def decider(connector):
    return connector._cache.joining.current().decider


def assert_idle(connector):
    connector._cache.joining.current().flights.settle()
    assert not connector._loads
    rig.assert_idle(decider(connector))


def store(connector, pool, prompt):
    slots = pool.take(len(prompt))
    pool.compute(prompt, slots)
    finish(connector, prompt, slots)
    pool.give(slots)


class TestLoading:
    @pytest.mark.parametrize("layerwise", [True, False])
    @pytest.mark.parametrize("have", [0, 5, 16, 37, 79])
    def test_what_was_stored_comes_back(self, make, layerwise, have):
        pool, prompt = Pool(), tokens(100)
        connector = make(pool, use_layerwise=layerwise)
        store(connector, pool, prompt)
        own = pool.take(have)
        pool.compute(prompt, own)
        slots = match(connector, pool, prompt[:99], own)
        assert len(slots) == 96
        forward(connector, pool.layers, lambda layer: _is_right(pool, prompt, slots, layer))
        assert_idle(connector)

    def test_nothing_but_the_given_slots_is_written(self, make):
        pool, prompt = Pool(), tokens(64)
        connector = make(pool)
        store(connector, pool, prompt)
        for tensor in (*pool.k, *pool.v):
            tensor.fill_(7)
        slots = match(connector, pool, prompt)
        forward(connector, pool.layers)
        others = [slot for slot in range(pool.slots + 1) if slot not in slots]
        assert all((tensor[others] == 7).all() for tensor in (*pool.k, *pool.v))

    def test_a_layer_is_there_when_it_is_read_and_the_next_one_is_not_yet(self, make):
        """So loading goes on while layers are computed."""
        pool, prompt = Pool(), tokens(40)
        connector = make(pool)
        store(connector, pool, prompt)
        pool.k[1].fill_(POISONED), pool.k[2].fill_(POISONED)
        slots = match(connector, pool, prompt)
        assert pool.wrong(prompt, slots, 0) == []
        assert pool.wrong(prompt, slots, 1) == pool.wrong(prompt, slots, 2) == list(range(32))
        connector.load_kv_layerwise(0)
        assert pool.wrong(prompt, slots, 1) == []
        assert pool.wrong(prompt, slots, 2) == list(range(32))
        connector.load_kv_layerwise(0)
        assert pool.wrong(prompt, slots, 2) == list(range(32))
        connector.load_kv_layerwise(1)
        assert pool.wrong(prompt, slots, 2) == []
        assert_idle(connector)

    def test_loads_that_overlap(self, make):
        """A second match may come before the first one's forward pass, or in the middle of it."""
        pool, first, second = Pool(), tokens(50), tokens(70, 2)
        connector = make(pool)
        store(connector, pool, first)
        store(connector, pool, second)
        one = match(connector, pool, first)
        connector.load_kv_layerwise(0)
        two = match(connector, pool, second)
        connector.load_kv_layerwise(1)
        forward(connector, pool.layers)
        for layer in range(pool.layers):
            assert pool.wrong(first, one, layer) == pool.wrong(second, two, layer) == []
        assert_idle(connector)

    def test_a_model_of_one_layer(self, make):
        pool, prompt = Pool(layers=1), tokens(40)
        connector = make(pool)
        store(connector, pool, prompt)
        slots = match(connector, pool, prompt)
        assert pool.wrong(prompt, slots, 0) == []
        assert_idle(connector)

    def test_forward_passes_without_loads(self, make):
        pool = Pool()
        before = pool.snapshot()
        forward(make(pool), pool.layers)
        assert torch.equal(pool.snapshot(), before)

    @pytest.mark.parametrize("have", [32, 40, 48, 63])
    def test_no_more_than_sglang_has(self, make, have):
        """Never a few tokens of the chunk that it has a part of: it would free the wrong slots."""
        pool, prompt = Pool(), tokens(64)
        connector = make(pool)
        store(connector, pool, prompt[:33])
        slots = pool.take(have)
        pool.compute(prompt, slots)
        assert match(connector, pool, prompt, slots) == slots
        assert_idle(connector)

    def test_a_prompt_that_goes_another_way(self, make):
        pool, prompt = Pool(), tokens(100)
        connector = make(pool)
        store(connector, pool, prompt)
        other = prompt[:40] + tokens(60, 9)
        slots = match(connector, pool, other)
        assert len(slots) == 32
        forward(connector, pool.layers)
        assert pool.wrong(other, slots, 2) == []

    def test_tokens_may_be_a_list(self, make):
        pool, prompt = Pool(), list(tokens(40))
        connector = make(pool)
        store(connector, pool, prompt)
        assert len(match(connector, pool, prompt)) == 32

    def test_what_was_evicted_is_computed(self, make):
        pool = Pool(layers=2)
        connector = make(pool, max_local_cpu_size=0.0005)
        for seed in range(20):
            store(connector, pool, tokens(50, seed))
        assert match(connector, pool, tokens(50, 0)) == []
        assert len(match(connector, pool, tokens(50, 19))) == 48


class TestStoring:
    def test_the_last_token_may_still_be_computed(self, make):
        pool = Pool()
        connector = make(pool)
        for length, stored in ((16, 0), (17, 16), (32, 16), (33, 32)):
            prompt = tokens(length, length)
            store(connector, pool, prompt)
            assert len(match(connector, pool, prompt + tokens(20))) == stored
            forward(connector, pool.layers)

    @pytest.mark.parametrize("length", [0, 1, 2])
    def test_health_checks(self, make, length):
        pool = Pool()
        connector = make(pool)
        store(connector, pool, tokens(length))
        assert match(connector, pool, tokens(length)) == []
        assert connector.errors == 0

    def test_what_is_known_is_not_stored_again(self, make):
        pool, prompt = Pool(), tokens(100)
        connector = make(pool)
        store(connector, pool, prompt)
        store(connector, pool, prompt + tokens(50, 3))
        connector._cache.joining.current().flights.settle()
        assert len(decider(connector)) == 9

    def test_reset_drops_everything(self, make):
        pool, prompt = Pool(), tokens(40)
        connector = make(pool)
        store(connector, pool, prompt)
        connector.reset()
        assert match(connector, pool, prompt) == []


class TestTroubles:
    def test_an_error_in_a_lookup_is_a_miss_and_the_ranks_still_agree(self, make, errors):
        pool, prompt, asked = Pool(), tokens(40), []
        connector = make(pool)
        store(connector, pool, prompt)
        connector._ranks.least = lambda number: asked.append(number) or number
        connector._cache.scheduler.find = None
        for _ in range(5):
            assert match(connector, pool, prompt) == []
        assert asked == [0] * 5
        assert len(errors) == 3

    def test_an_error_in_the_first_layer(self, make, monkeypatch):
        pool, prompt = Pool(), tokens(40)
        connector = make(pool)
        store(connector, pool, prompt)

        def fail(self):
            raise OSError("on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(Loading, "layer", fail)
            assert match(connector, pool, prompt) == []
        assert_idle(connector)

    def test_a_first_layer_that_is_not_what_was_promised(self, make, monkeypatch):
        pool, prompt = Pool(), tokens(40)
        connector = make(pool)
        store(connector, pool, prompt)
        monkeypatch.setattr(Loading, "layer", lambda self: False)
        assert match(connector, pool, prompt) == []
        assert_idle(connector)

    def test_a_later_layer_that_is_not_what_was_promised_ends_the_server(self, make, monkeypatch):
        """Whoever has been told of a hit computes from it."""
        pool, prompt = Pool(), tokens(40)
        connector = make(pool)
        store(connector, pool, prompt)
        match(connector, pool, prompt)
        monkeypatch.setattr(Loading, "layer", lambda self: False)
        with pytest.raises(RuntimeError, match="promised"):
            connector.load_kv_layerwise(0)

    def test_an_error_in_a_store(self, make, errors):
        pool, prompt = Pool(), tokens(40)
        connector = make(pool)
        connector._cache.worker.store = None
        store(connector, pool, prompt)
        assert len(errors) == 1

    def test_closing_twice_in_the_middle_of_a_load(self, make):
        pool, prompt = Pool(), tokens(40)
        connector = make(pool)
        store(connector, pool, prompt)
        match(connector, pool, prompt)
        connector.close()
        connector.close()
        before = pool.snapshot()
        forward(connector, pool.layers)
        assert match(connector, pool, prompt) == []
        store(connector, pool, prompt[:0])
        assert torch.equal(pool.snapshot(), before)


class TestRanks:
    def test_a_rank_that_has_more_than_another_loads_what_both_have(self, make):
        pool, prompt = Pool(), tokens(100)
        connector = make(pool)
        store(connector, pool, prompt)
        for tensor in (*pool.k, *pool.v):
            tensor.fill_(7)
        connector._ranks.least = lambda number: min(number, 48)
        own = pool.take(20)
        slots = match(connector, pool, prompt, own)
        assert len(slots) == 48
        forward(connector, pool.layers)
        assert {p for layer in (1, 2) for p in pool.wrong(prompt, slots, layer)} == set(range(20))
        for layer in (1, 2):  # slots that SGLang has freed are somebody else's
            assert int((pool.k[layer] != 7).any(-1).any(-1).sum()) == 28
        assert_idle(connector)

    def test_each_rank_has_its_share_of_the_memory(self, make):
        pools = [Pool(rank=rank) for rank in range(2)]
        sizes = [
            decider(make(pool, tp_size=2, rank=rank)).slab.size for rank, pool in enumerate(pools)
        ]
        assert sum(sizes) <= 0.05 * (1 << 30) < 1.1 * sum(sizes)

    def test_two_processes_agree(self, settings):
        """Real ranks: one of them has lost its chunks, so none of them loads."""
        port = str(free_port())
        ranks = [
            subprocess.Popen(
                [sys.executable, str(HERE / "rank.py"), str(rank), port, settings()],
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        found = [json.loads(rank.communicate(timeout=100)[0]) for rank in ranks]
        assert found == [[0, 32, 0, 0]] * 2


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        "change",
        [
            lambda pool: pool.transpose(0, 1),
            lambda pool: pool.flatten(1),
            lambda pool: pool[:, :, ::2],
        ],
    )
    def test_pools_of_another_layout(self, make, change):
        pool = Pool()
        pool.k[1] = change(pool.k[1])
        with pytest.raises(LayoutError, match="layer 1 keys: shape"):
            make(pool)

    def test_pools_that_do_not_fit_together(self, make):
        pool = Pool()
        pool.v.pop()
        with pytest.raises(LayoutError, match="3 layers of keys and 2 of values"):
            make(pool)

    @pytest.mark.parametrize(
        ("said", "option"),
        [
            ({"pp_size": 2}, "--pp-size"),
            ({"enable_dp_attention": True}, "--enable-dp-attention"),
            ({"enable_lora": True}, "--enable-lora"),
            ({"lora_paths": ["a=b"]}, "--enable-lora"),
        ],
    )
    def test_ways_to_serve_whose_kv_cannot_be_told_apart(self, make, monkeypatch, said, option):
        said = {"pp_size": 1, "kv_cache_dtype": "auto", **said}
        monkeypatch.setattr(
            "lmcache.adapters.sglang.connector.server_args_of", lambda: SimpleNamespace(**said)
        )
        with pytest.raises(ConfigError, match=option):
            make(Pool())

    def test_an_exchange_of_two_ranks(self, make):
        with pytest.raises(LayoutError, match="one rank, this one has 2"):
            make(Pool(), tp_size=2, exchange="e")

    def test_an_exchange_of_numbers_that_may_be_quantized(self, make):
        with pytest.raises(LayoutError, match="not for torch.uint8"):
            make(Pool(), exchange="e")

    def test_an_exchange_of_layers_that_are_not_alike(self, make):
        pool = Pool()
        pool.k[1], pool.v[1] = pool.k[1][:, :1].clone(), pool.v[1][:, :1].clone()
        with pytest.raises(LayoutError, match="layers that are all alike"):
            make(pool, exchange="e")

    def test_a_key_nobody_knows(self, make):
        with pytest.raises(ConfigError, match="chunk_sizes"):
            make(Pool(), chunk_sizes=3)


class TestKeys:
    def test_whatever_tells_kv_apart_tells_keys_apart(self, settings):
        from lmcache.core.config import load_config

        config = load_config(file=settings()).config
        pools = [torch.zeros(4, 2, 8)]

        class Hf(SimpleNamespace):
            def to_dict(self):
                return vars(self)

        def key(parallel="tp0of1", pools=pools, config=config, **said):
            about = {"model_path": "m", "hf_config": Hf(rope_theta=1), "dtype": "x", **said}
            return translate.namespace_of(SimpleNamespace(**about), config, pools, parallel)

        others = [
            key(model_path="n"),
            key(hf_config=Hf(rope_theta=2)),
            key(dtype="y"),
            key(revision="r"),
            key(quantization="q"),
            key(parallel="tp1of2"),
            key(pools=[pools[0].half()]),
            key(config=config.model_copy(update={"weight_generation": "2"})),
            key(config=config.model_copy(update={"model_id": "z"})),
        ]
        assert key() == key()
        assert len({key(), *others}) == len(others) + 1

    def test_in_an_exchange_only_its_name_counts_and_what_the_pools_hold(self, settings):
        """The rest is how one engine names what is the same in another."""
        loaded = load_settings(settings(exchange="e")).config
        pools = [torch.zeros(9, 2, 16)] * 4
        said = translate.namespace_of(MODEL, loaded, pools, "tp0of1")
        assert said == exchange_namespace("e", "")
        changed = loaded.model_copy(update={"weight_generation": "2"})
        assert translate.namespace_of(MODEL, changed, pools, "tp0of1") != said
        layouts = {
            translate.layout_of(pools, exchanged=exchanged).fingerprint
            for pools in (pools, pools[:2], [pool.half() for pool in pools])
            for exchanged in (True, False)
        }
        assert len(layouts) == 6


POISONED = 3


def _is_right(pool, prompt, slots, layer):
    assert pool.wrong(prompt, slots, layer) == []


def test_slots_that_sglang_has_itself():
    assert translate.absent_in([-1, -1, 4, 9]) == 2
    assert translate.absent_in([-1, -1]) == 2
    assert translate.absent_in([]) == 0


def test_its_metadata_is_made_by_keyword():
    old = LoadMetadata(token_ids=[1], slot_mapping=mapping(0, [1]), offset=0)
    assert (old.prefix_pad, old.request_id) == (0, "")
