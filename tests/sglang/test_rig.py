"""What the tests of our SGLang connectors build on, without any of ours."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.engine

SERVERS = {
    "0.5.9": {},
    "0.5.20": {},
    "0.5.23": {},
    "0.5.23 on two ranks": {"tp": 2},
}


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


@pytest.fixture(scope="module", params=SERVERS)
def server(request, start_sglang):
    version = request.param.split()[0]
    with start_sglang(version, lmcache=False, **SERVERS[request.param]) as server:
        yield server


@pytest.fixture(scope="module")
def first_said():
    """What the first server said; in single precision, every other says the same."""
    return {}


def test_an_answer_is_cached_until_it_is_flushed(server):
    prompt = tokens(1, 300)
    cold, warm = server.generate(prompt), server.generate(prompt)
    server.flush()
    flushed = server.generate(prompt)
    assert cold.output_ids == warm.output_ids == flushed.output_ids
    assert [cold.cached_tokens, warm.cached_tokens, flushed.cached_tokens] == [0, 299, 0]


def test_every_server_says_the_same(server, first_said):
    for number in range(2, 6):
        said = server.generate(tokens(number, 200)).output_ids
        assert len(said) == 8
        assert said == first_said.setdefault(number, said)


def test_what_is_said_depends_on_what_was_long_ago(server):
    """Or a test could not tell a wrong key or value from the right one."""
    end = tokens(6, 200)
    said = server.many([tokens(number, 100) + end for number in range(7, 13)])
    assert len({tuple(answer.output_ids) for answer in said}) == len(said)


def test_many_at_once_say_what_each_says_alone(server):
    prompts = [tokens(20, 150) + tokens(number, 20) for number in range(21, 27)]
    together = server.many(prompts)
    server.flush()
    assert [a.output_ids for a in together] == [server.generate(p).output_ids for p in prompts]


def test_a_request_can_be_cancelled(server):
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.generate, tokens(30, 100), 2000, rid="long")
        while not answer.done():  # an abort may come before the request
            time.sleep(0.2)
            server.abort("long")
        assert answer.result().finish_reason == "abort"
