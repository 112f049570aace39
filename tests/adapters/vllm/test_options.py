"""What requests and the configuration ask for: what is stored, what is loaded, what is answered."""

from __future__ import annotations

import pytest

CHUNK = 16


# --- what is stored


def test_generated_tokens_are_not_stored_by_default(engine):
    engine.generate("a", range(40), max_tokens=60)
    assert engine.stored == 40
    assert all(not step.stores for step in engine.steps[1:])


@pytest.mark.parametrize("length", [5, 16, 30, 40])
def test_generated_tokens_are_stored_chunk_by_chunk(make_engine, length):
    engine = make_engine(options={"save_decode_cache": True})
    engine.generate("a", range(length), max_tokens=60)
    # the last token is sampled and never computed
    whole = (length + 59) // CHUNK * CHUNK
    tail = length % CHUNK // 4 * 4
    assert engine.stored == whole + tail
    told = [*range(length), *engine.outputs["a"]]
    assert engine.generate("b", told[: whole + 3]) == whole
    engine.check_text()
    engine.check_idle()


def test_a_tail_that_goes_on_in_decode_is_stored_as_a_whole_chunk(make_engine):
    engine = make_engine(options={"save_decode_cache": True})
    engine.generate("a", range(24), max_tokens=2)
    engine.add("b", range(24), max_tokens=30)  # its hit ends inside a chunk
    engine.run()
    told = [*range(24), *engine.outputs["b"]]
    assert engine.generate("c", told[:49]) == 48
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_without_unfull_chunks_only_whole_ones_are_stored(make_engine, length):
    engine = make_engine(options={"save_unfull_chunk": False})
    engine.generate("cold", range(length))
    assert engine.stored == length // CHUNK * CHUNK
    found = length // CHUNK * CHUNK
    assert engine.generate("warm", range(length)) == found - (found == length)
    engine.check_text()
    engine.check_idle()


def test_a_request_may_ask_not_to_be_stored(engine):
    engine.generate("a", range(40), transfer={"lmcache.skip_save": True})
    assert engine.stored == 0
    engine.generate("b", range(40), transfer={"lmcache.skip_save": False})
    assert engine.stored == 40
    assert engine.generate("c", range(60), transfer={"lmcache.skip_save": True}) == 40
    assert engine.stored == 40
    engine.check_text()
    engine.check_idle()


def test_requests_of_low_priority_are_not_stored(make_engine):
    engine = make_engine(options={"priority_limit": 3})
    engine.generate("low", range(40), priority=4)
    assert engine.stored == 0
    engine.generate("just", range(40), priority=3)
    assert engine.stored == 40
    assert engine.generate("low again", range(60), priority=9) == 40
    assert engine.stored == 40
    engine.check_text()


@pytest.mark.parametrize("value", ["1", "true"])
def test_storing_can_be_switched_off(make_engine, monkeypatch, value):
    monkeypatch.setenv("LMCACHE_FORCE_SKIP_SAVE", value)
    engine = make_engine()
    engine.generate("a", range(40))
    assert engine.stored == 0
    engine.check_text()
    engine.check_idle()


def test_a_producer_stores_and_never_loads(make_engine):
    engine = make_engine(role="kv_producer")
    assert engine.generate("a", range(40)) == 0
    assert engine.generate("b", range(60)) == 0
    assert engine.stored == 40 + 28  # what is stored is not stored again, but for the half chunk
    assert engine.counters["lookups"] == 0
    engine.check_text()
    engine.check_idle()


def test_a_consumer_loads_and_never_stores(make_engine):
    engine = make_engine(role="kv_consumer")
    engine.side._stores = True
    engine.generate("a", range(40))
    engine.side._stores = False
    assert engine.generate("b", range(60)) == 40
    assert engine.stored == 40
    engine.check_text()
    engine.check_idle()


# --- what is not cached


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"resumable": True}, id="streamed"),
        pytest.param({"lora": True}, id="lora reloaded in place"),
        pytest.param({"embeds": True}, id="prompt embeddings"),
    ],
)
def test_what_has_no_key_touches_nothing(engine, fields, rig):
    engine.generate("cold", range(40))
    request = unkeyable(engine, rig, **fields)
    engine.submit(request)
    assert engine.schedule().num_scheduled_tokens == {"x": request.num_tokens}
    assert engine.loaded == 0
    assert engine.stored == 40
    engine.abort("x")
    assert engine.impl.errors == 0
    assert not engine.side._tracked


def unkeyable(engine, rig, *, resumable=False, lora=False, embeds=False):
    from vllm.lora.request import LoRARequest

    if resumable:
        return engine.request("x", range(40), resumable=True)
    if lora:
        return engine.request(
            "x", range(40), lora_request=LoRARequest("l", 1, "/tmp/l", load_inplace=True)
        )
    request = engine.request("y", range(40))
    return type(request)(
        "x",
        None,
        request.sampling_params,
        None,
        prompt_embeds=rig.torch.zeros(40, 8),
    )


def test_a_prompt_of_tokens_and_embeddings_touches_nothing(engine, rig):
    engine.generate("cold", range(40))
    request = engine.request(
        "mixed",
        range(40),
        prompt_embeds=rig.torch.zeros(40, 8),
        prompt_is_token_ids=[True] * 20 + [False] * 20,
    )
    engine.submit(request)
    engine.schedule()
    assert (engine.loaded, engine.stored) == (0, 40)


def test_prompt_logprobs_want_every_token_computed(engine):
    engine.generate("cold", range(40))
    assert engine.generate("a", range(40), sampling={"prompt_logprobs": 1}) == 0
    assert engine.generate("b", range(60), sampling={"prompt_logprobs": 1}) == 0
    assert engine.stored == 40 + 28
    engine.check_text()
    engine.check_idle()


def test_a_request_that_skips_vllms_prefix_cache_skips_ours(engine):
    engine.generate("cold", range(40))
    assert engine.generate("a", range(40), sampling={"skip_reading_prefix_cache": True}) == 0
    assert engine.generate("b", range(40), sampling={"skip_reading_prefix_cache": False}) == 39
    engine.check_text()
    engine.check_idle()


# --- what is answered


def test_nothing_is_said_unasked(engine):
    engine.generate("a", range(40))
    engine.generate("b", range(40), transfer={"do_something": True})
    assert engine.params == {"a": None, "b": None}


def test_details_on_request_of_the_configuration(make_engine):
    engine = make_engine(extra={"enable_cache_usage_details_in_response": True})
    engine.generate("cold", range(40))
    engine.generate("warm", range(60))
    assert engine.params == {
        "cold": {"num_lmcache_cached_tokens": 0},
        "warm": {"num_lmcache_cached_tokens": 40},
    }


def test_the_first_token_on_request(engine):
    engine.generate("a", range(40), max_tokens=3, transfer={"ret_first_tok": True})
    assert engine.params["a"] == {"first_tok": engine.outputs["a"][0]}


def test_there_is_no_first_token_before_there_is_one(engine):
    request = engine.add("a", range(40), transfer={"ret_first_tok": True})
    assert engine.impl.request_finished(request, []) == (False, None)


def test_the_first_token_is_said_without_a_cache_too(make_engine):
    engine = make_engine(with_workers=False)
    engine.generate("a", range(40), transfer={"ret_first_tok": True})
    assert engine.params["a"] == {"first_tok": engine.outputs["a"][0]}


@pytest.mark.parametrize("transfer", ["text", 7, ["lmcache.skip_save"]])
def test_params_that_are_no_mapping_are_no_options(engine, transfer):
    request = engine.request("a", range(40))
    request.kv_transfer_params = transfer
    for name in ("a", "b"):
        request.request_id = name
        assert engine.impl.get_num_new_matched_tokens(request, 0) == 0
        assert engine.impl.request_finished(request, []) == (False, None)
    assert engine.impl.errors == 0


# --- the configuration


def test_a_key_nobody_knows_stops_the_engine(make_engine, rig):
    from lmcache.core.errors import ConfigError

    with pytest.raises(ConfigError, match="lmcache.chunk_size"):
        make_engine(options={"chunk_sise": 16})


def test_an_exchange_that_is_to_be_loaded_layer_by_layer(make_engine):
    from lmcache.core.errors import ConfigError

    with pytest.raises(ConfigError, match="unset use_layerwise"):
        make_engine(options={"exchange": "e", "use_layerwise": True})


def test_an_exchange_whose_pages_the_server_is_to_copy(make_engine, make_house):
    from lmcache.core.errors import ConfigError

    lent = {"lmcache.mp.mp_transfer_mode": "lmcache_driven"}
    with pytest.raises(ConfigError, match="set lmcache.mp.mp_transfer_mode to engine_driven"):
        make_engine(house=make_house(), options={"exchange": "e"}, extra=lent)


def test_in_an_exchange_only_its_name_counts(rig, base_config):
    from lmcache.adapters.vllm.translate import namespace_of
    from lmcache.core.config_keys import Config
    from lmcache.core.exchange import exchange_namespace

    config = Config(exchange="e", weight_generation="2")
    assert namespace_of(base_config, config) == exchange_namespace("e", "2")


def test_keys_of_others_are_theirs(make_engine):
    engine = make_engine(extra={"use_layerwise": False, "nixl.something": 1})
    engine.generate("a", range(40))
    assert engine.stored == 40


def test_chunks_are_whole_pages(make_engine, lines):
    engine = make_engine(options={"chunk_size": 10, "save_unfull_chunk": False})
    assert len(lines.about("chunk_size 10 is not whole engine pages of 4 tokens: using 12")) == 1
    engine.generate("cold", range(40))
    assert engine.stored == 36
    assert engine.generate("warm", range(40)) == 36
    engine.check_text()
    engine.check_idle()


def test_a_chunk_may_be_one_page(make_engine):
    engine = make_engine(options={"chunk_size": 1})
    engine.generate("cold", range(40))
    assert engine.generate("warm", [*range(23), *range(60, 80)]) == 20
    engine.check_text()
    engine.check_idle()


# --- events


def test_events_tell_what_was_stored(make_engine):
    engine = make_engine(options={"enable_kv_events": True})
    engine.generate("a", range(40))
    [events] = engine.runner.events
    stored = events.get_all_events()
    assert sorted(len(event.token_ids) for event in stored) == [8, 16, 16]
    by_first = sorted(stored, key=lambda event: event.token_ids[0])
    assert [t for event in by_first for t in event.token_ids] == list(range(40))
    for event, parent in zip(by_first[1:], by_first, strict=False):
        assert event.parent_block_hash in parent.block_hashes
    engine.generate("b", range(40))
    assert len(engine.runner.events) == 1


def test_there_are_no_events_unasked(engine):
    engine.generate("a", range(40))
    assert engine.runner.events == []
