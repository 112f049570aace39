"""A real vLLM and a real SGLang on one server: what one computed, the other loads."""

from __future__ import annotations

import random

import pytest

pytestmark = pytest.mark.engine

CHUNK, PAGE = 64, 32
SAID = 16
EXCHANGE = "tiny"


def tokens(seed, count):
    return random.Random(seed).choices(range(256), k=count)


FIRST = [tokens(seed, 150 + 40 * seed) for seed in range(6)]


def whole(prompts, size=CHUNK):
    return [len(prompt) // size * size for prompt in prompts]


@pytest.fixture(scope="module")
def cache(start_lmcache):
    return start_lmcache("--l1-size-gb", "0.3", "--chunk-size", str(CHUNK))


@pytest.fixture(scope="module")
def vllm(start_vllm, cache):
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_connector_extra_config": {
            "lmcache.mp.port": cache.port,
            "lmcache.exchange": EXCHANGE,
        },
    }
    options = {"block_size": PAGE, "dtype": "float32", "kv_transfer_config": transfer}
    with start_vllm(**options) as engine:

        def ask(prompts):
            said = engine.generate(prompts, max_tokens=SAID, ignore_eos=True)
            return [one.token_ids for one in said], [one.num_cached_tokens for one in said]

        yield ask


def sglang(start, version, file, cache, exchange):
    file.write_text(f"mp_host: 127.0.0.1\nmp_port: {cache.port}\nexchange: {exchange}\n")
    return start(version, config_file=file)


def asked(server, prompts):
    said = [server.generate(prompt, SAID) for prompt in prompts]
    return [one.output_ids for one in said], [one.cached_tokens for one in said]


@pytest.mark.parametrize("version", ["0.5.20", "0.5.23"])
def test_each_loads_what_the_other_computed(version, start_sglang, vllm, cache, tmp_path):
    said, _ = vllm(FIRST)
    cache.wait_idle()
    with sglang(start_sglang, version, tmp_path / "one.yaml", cache, EXCHANGE) as server:
        assert asked(server, FIRST) == (said, whole(FIRST))
        server.flush()
        # of each only the beginning is there already
        new = [prompt[:100] + tokens(f"{version}{n}", 150) for n, prompt in enumerate(FIRST)]
        computed, cached = asked(server, new)
        assert cached == [CHUNK] * len(FIRST)
        cache.wait_idle()
        assert vllm(new) == (computed, whole(new))


def test_nobody_else_finds_it(start_sglang, vllm, cache, tmp_path):
    """The same model on the same server, in another exchange."""
    said, _ = vllm(FIRST)
    cache.wait_idle()
    with sglang(start_sglang, "0.5.23", tmp_path / "other.yaml", cache, "other") as server:
        computed, cached = asked(server, FIRST)
        assert computed == said
        assert max(cached) < CHUNK  # some begin with the same token, in its own radix tree
