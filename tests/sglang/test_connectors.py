"""A real SGLang with our connectors, in each way in which it has called them."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

HERE = Path(__file__).resolve().parent
CHUNK = 16
PINNED_S = 5
SERVED = ("--l1-size-gb", "0.3", "--chunk-size", str(CHUNK))


@dataclass(frozen=True)
class Way:
    """A version, how it calls us, and how it is told to run."""

    version: str
    with_server: bool
    options: dict = field(default_factory=dict)

    @property
    def page(self):
        return self.options.get("page", 1)

    @property
    def pool_tokens(self):
        """With a server, too few for all that is asked for.

        In-process, SGLang keeps what has ended locked until it evicts, and once that leaves no room
        for a request while none runs, it waits for ever.
        """
        return 1600 if self.with_server else 32768


BUSY = {"page": 16, "chunked": 64, "overlap": True}
WAYS = {
    "0.5.9": Way("0.5.9", False),
    "0.5.9, busy": Way("0.5.9", False, BUSY),
    "0.5.9, two ranks": Way("0.5.9", False, {"tp": 2}),
    "0.5.20 in-process, busy": Way("0.5.20", False, {"in_process": True, **BUSY}),
    "0.5.20": Way("0.5.20", True),
    "0.5.20, busy": Way("0.5.20", True, BUSY),
    "0.5.20, two ranks": Way("0.5.20", True, {"tp": 2}),
    "0.5.23": Way("0.5.23", True),
    "0.5.23, busy": Way("0.5.23", True, BUSY),
    "0.5.23, two ranks": Way("0.5.23", True, {"tp": 2}),
}


def tokens(seed, count):
    return random.Random(seed).choices(range(256), k=count)


def requests():
    """Sixty of them, many of which begin alike."""
    rng = random.Random(7)
    beginnings = [tokens(100 + n, 400) for n in range(4)]
    return [
        rng.choice(beginnings)[: rng.randrange(40, 400)]
        + rng.choices(range(256), k=rng.randrange(1, 60))
        for _ in range(60)
    ]


@pytest.fixture(scope="module")
def reference(start_sglang):
    """What is said without any cache, for each prompt that is asked for."""
    wanted = {"prompt": tokens(1, 300), "other": tokens(1, 200) + tokens(2, 100)}
    with start_sglang("0.5.23", lmcache=False) as server:
        said = {name: server.generate(prompt).output_ids for name, prompt in wanted.items()}
        server.flush()
        many = []
        for prompt in requests():
            many.append(server.generate(prompt).output_ids)
            server.flush()
    return {**wanted, **{f"{name} said": ids for name, ids in said.items()}, "many": many}


def configured(way, folder, port):
    """A configuration file, and how a version is told of it."""
    folder.mkdir(exist_ok=True)
    file = folder / "lmcache.yaml"
    if way.with_server:
        file.write_text(f"mp_host: 127.0.0.1\nmp_port: {port}\npin_timeout_sec: {PINNED_S}\n")
    else:
        file.write_text(
            f"chunk_size: {CHUNK}\nlocal_cpu: true\nuse_layerwise: true\nmax_local_cpu_size: 0.3\n"
        )
    if way.version == "0.5.9":  # which has no option for it
        return {"env": {"LMCACHE_CONFIG_FILE": str(file)}}
    return {"config_file": file, "env": {}}


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture(scope="module")
def cache(way, start_lmcache):
    return start_lmcache(*SERVED) if way.with_server else None


@pytest.fixture(scope="module")
def server(way, cache, start_sglang, tmp_path_factory):
    said = configured(way, tmp_path_factory.mktemp("config"), cache and cache.port)
    said["env"]["LMCACHE_LOG_LEVEL"] = "INFO"
    options = {"pool_tokens": way.pool_tokens, **way.options, **said}
    with start_sglang(way.version, **options) as server:
        yield server
        if way.version == "0.5.9":  # it waits for requests that it has given up
            server.kill()


def test_a_prompt_in_all_ways_it_may_be_found(way, server, reference):
    """Computed, in the radix tree, only in LMCache, in both, and only a part of it."""

    def ask(prompt):
        answer = server.generate(prompt)
        return answer.output_ids, answer.cached_tokens

    prompt, said = reference["prompt"], reference["prompt said"]
    whole = 299 // way.page * way.page
    assert ask(prompt) == (said, 0)
    assert ask(prompt) == (said, whole)
    server.flush()
    assert ask(prompt) == (said, 288)
    server.flush()
    server.generate(prompt[:37], 1)
    assert ask(prompt) == (said, 288)
    assert ask(reference["other"]) == (reference["other said"], 200 // way.page * way.page)
    server.flush()
    assert ask(reference["other"]) == (reference["other said"], 288)


def test_many_at_once(way, server, cache, reference):
    """With a server, the pool is evicted from all the time."""
    prompts = requests()
    for _ in range(2):
        said = server.many(prompts)
        assert [answer.output_ids for answer in said] == reference["many"]
    assert sum(answer.cached_tokens for answer in said) > 0.8 * sum(map(len, prompts))
    server.flush()  # it is idle, so it has counted its slots
    if cache:
        cache.wait_idle()


def test_some_requests_are_given_up(way, server, cache, reference):
    prompts = requests()
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(server.many, prompts)
        given_up = []
        for number in range(20):
            rid = f"long{number}"
            given_up.append(pool.submit(server.generate, tokens(number, 300), 200, rid=rid))
            while not given_up[-1].done():  # an abort may come before the request
                time.sleep(0.05)
                server.abort(rid)
        said = asked.result()
    assert any(request.result().finish_reason == "abort" for request in given_up)
    assert [answer.output_ids for answer in said] == reference["many"]
    server.flush()
    if way.version == "0.5.20":  # it does not say which of the waiting were given up
        time.sleep(PINNED_S)
        server.generate(reference["prompt"])
    if cache:
        cache.wait_idle()


@pytest.mark.parametrize("name", ["0.5.9, busy", "0.5.20 in-process, busy"])
def test_a_pool_that_is_evicted_from_in_process(name, start_sglang, reference, tmp_path):
    """While other requests run; if none did, SGLang could wait for ever: see docs/sglang.md."""
    way = WAYS[name]
    said = configured(way, tmp_path, None)
    said["env"]["LMCACHE_LOG_LEVEL"] = "INFO"
    is_over = threading.Event()

    def keep_it_busy(seed):
        while not is_over.is_set():
            server.generate(tokens(seed, 20), 700, rid=str(seed))

    with start_sglang(way.version, pool_tokens=4096, **way.options, **said) as server:
        with ThreadPoolExecutor(2) as pool:
            busy = [pool.submit(keep_it_busy, seed) for seed in (8, 9)]
            for _ in range(3):
                answers = server.many(requests(), at_once=4)
                assert [answer.output_ids for answer in answers] == reference["many"]
            is_over.set()
            for future in busy:
                future.result()
        # without a flush, only what was evicted is loaded
        assert server.log().count("Retrieved") > 40
        server.flush()  # it is idle, so it has counted its slots
        server.kill()


def test_a_load_that_is_wrong_is_seen(start_sglang, start_lmcache, reference, tmp_path):
    """Or none of these tests could fail."""
    way = WAYS["0.5.23"]
    cache = start_lmcache(*SERVED)
    said = configured(way, tmp_path, cache.port)
    said["env"]["PYTHONPATH"] = str(HERE / "corrupting")
    with start_sglang(way.version, **said) as server:
        first = server.generate(reference["prompt"])
        server.flush()
        second = server.generate(reference["prompt"])
    assert (first.cached_tokens, second.cached_tokens) == (0, 288)
    assert first.output_ids == reference["prompt said"]
    assert second.output_ids != first.output_ids


@pytest.mark.parametrize("version", ["0.5.20", "0.5.23"])
def test_a_server_that_is_killed_and_started_again_under_load(
    version, start_sglang, start_lmcache, reference, tmp_path
):
    way = WAYS[version]
    cache = start_lmcache(*SERVED)
    prompts = requests()
    said = configured(way, tmp_path, cache.port)
    with start_sglang(version, pool_tokens=way.pool_tokens, **said) as server:
        server.many(prompts[:10])
        is_over = threading.Event()

        def trouble():
            for _ in range(5):
                time.sleep(0.5)
                cache.kill()
                time.sleep(0.5)
                cache.start()
            is_over.set()

        thread = threading.Thread(target=trouble)
        thread.start()
        while not is_over.is_set():
            assert [a.output_ids for a in server.many(prompts)] == reference["many"]
            server.flush()
        thread.join()
        cache.wait(lambda status: len(status["engines"]) == 1)
        server.many(prompts)
        server.flush()
        said = server.many(prompts)
        assert [answer.output_ids for answer in said] == reference["many"]
        assert sum(answer.cached_tokens for answer in said) > 0.8 * sum(map(len, prompts))
        server.flush()
        cache.wait_idle()
