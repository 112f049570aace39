"""A real vLLM and a real SGLang on one server: what one computed, the other loads."""

from __future__ import annotations

import json
import random

import pytest

pytestmark = pytest.mark.engine

CHUNK = 32
SAID = 8
EXCHANGE = "tiny-1"


def tokens(seed, count):
    return random.Random(seed).choices(range(256), k=count)


PROMPTS = [tokens(seed, 100 + 40 * seed) for seed in range(6)]
WHOLE = [len(prompt) // CHUNK * CHUNK for prompt in PROMPTS]


@pytest.fixture
def cache(start_lmcache):
    return start_lmcache("--l1-size-gb", "0.3", "--chunk-size", str(CHUNK))


@pytest.fixture
def new_vllm(start_vllm, cache):
    def start(exchange=EXCHANGE, **engine_args):
        extra = {"lmcache.mp.port": cache.port, "lmcache.exchange": exchange}
        return start_vllm(
            block_size=CHUNK,
            dtype="float32",
            kv_transfer_config={
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
                "kv_connector_extra_config": extra,
            },
            **engine_args,
        )

    return start


@pytest.fixture
def new_sglang(start_sglang, cache, tmp_path):
    def start(exchange=EXCHANGE, version="0.5.23", **options):
        file = tmp_path / "lmcache.yaml"
        said = {"mp_host": "127.0.0.1", "mp_port": cache.port, "exchange": exchange}
        file.write_text(json.dumps(said))
        return start_sglang(version, config_file=file, **options)

    return start


def asked_of_sglang(server):
    said = [server.generate(prompt, SAID) for prompt in PROMPTS]
    return [a.output_ids for a in said], [a.cached_tokens for a in said]


def asked_of_vllm(engine):
    said = [engine.generate([prompt], max_tokens=SAID, ignore_eos=True)[0] for prompt in PROMPTS]
    return [a.token_ids for a in said], [a.num_cached_tokens for a in said]


def test_what_vllm_computed_sglang_loads_and_the_other_way_round(cache, new_vllm, new_sglang):
    with new_vllm() as engine:
        computed, cached = asked_of_vllm(engine)
        assert cached == [0] * len(PROMPTS)
    cache.wait_idle()
    with new_sglang() as server:
        loaded, cached = asked_of_sglang(server)
    assert (loaded, cached) == (computed, WHOLE)
