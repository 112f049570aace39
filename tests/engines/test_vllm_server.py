"""Real vLLM and a real server in processes of their own: one cache that outlives its engines."""

from __future__ import annotations

import random
import signal
import socket
import time
from pathlib import Path

import pytest
from harness import story
from ports import free_port
from served import ATTACHED_S, ask

pytestmark = pytest.mark.engine

DEADLINE_S = 1.0
"""What a call to the server may cost an engine, by default."""
STOPPED_S = 30.0


def names():
    """What lies where processes leave things behind."""
    return {str(path) for place in ("/dev/shm", "/tmp") for path in Path(place).iterdir()}


def test_a_second_engine_loads_what_the_first_computed(start_engine, start_server):
    server = start_server("--l1-size-gb", "1", "--chunk-size", "256")
    transfer = server.transfer()
    prompt = story(1, 1500)
    with start_engine(kv_transfer_config=transfer, one_process=True) as engine:
        cold = ask(engine, prompt)
        warm = ask(engine, prompt)
        assert warm.token_ids == cold.token_ids
        assert warm.num_cached_tokens > 1000
        assert cold.num_cached_tokens == 0
    server.wait(lambda status: not status["engines"])
    offloading = {
        "kv_offloading_backend": "lmcache",
        "kv_offloading_size": 1,
    }  # names the connector
    transfer = {key: value for key, value in transfer.items() if key.startswith("kv_connector_")}
    with start_engine(kv_transfer_config=transfer, **offloading) as engine:
        other = ask(engine, prompt)
        assert other.token_ids == cold.token_ids
        assert other.num_cached_tokens == warm.num_cached_tokens
        status = server.wait_idle()
        assert status["l1"]["chunks"] > 0
    server.wait(lambda status: not status["engines"] and not status["leaving"])
    assert server.stop() == 0


@pytest.fixture(scope="module")
def truth(start_engine):
    """What each story's answer is without a cache, and in any batch: in single precision."""
    answers = {}
    with start_engine(one_process=True, dtype="float32") as engine:
        for number in range(10, 22):
            answers[number] = ask(engine, story(number, 600))
    return answers


class TestTroubles:
    def test_the_server_may_start_last_and_go_and_come(self, start_engine, start_server, truth):
        server = start_server("--l1-size-gb", "0.5")
        server.kill()
        with start_engine(
            kv_transfer_config=server.transfer(), one_process=True, dtype="float32"
        ) as engine:
            assert ask(engine, story(10, 600)).token_ids == truth[10].token_ids
            for _ in range(2):
                server.start()
                server.wait(lambda status: status["engines"], ATTACHED_S)
                for number in (10, 10, 11):
                    answer = ask(engine, story(number, 600))
                    assert answer.token_ids == truth[number].token_ids
                assert ask(engine, story(11, 600)).num_cached_tokens > 0
                server.kill()
                spent = []
                for _ in range(2):
                    answer = ask(engine, story(10, 600))
                    assert answer.token_ids == truth[10].token_ids
                    spent.append(answer.ttft_s)
                assert spent[0] < 2 * spent[1] + DEADLINE_S, "it costs one deadline and no more"

    def test_a_server_that_is_stopped_costs_one_deadline(self, start_engine, start_server, truth):
        server = start_server("--l1-size-gb", "0.5")
        with start_engine(
            kv_transfer_config=server.transfer(), one_process=True, dtype="float32"
        ) as engine:
            server.wait(lambda status: status["engines"], ATTACHED_S)
            cold = ask(engine, story(10, 600))
            assert ask(engine, story(10, 600)).num_cached_tokens > 0
            server.send(signal.SIGSTOP)
            stopped, spent = time.monotonic(), []
            while time.monotonic() < stopped + STOPPED_S:
                number = 10 + len(spent) % 12
                answer = ask(engine, story(number, 600))
                assert answer.token_ids == truth[number].token_ids
                assert answer.num_cached_tokens == 0
                spent.append(answer.ttft_s)
            # all together: after the first, nobody waits for a server that does not answer
            assert sum(spent) < 2 * cold.ttft_s * len(spent) + DEADLINE_S
            server.send(signal.SIGCONT)
            server.wait_idle()
            ask(engine, story(9, 600))
            deadline = time.monotonic() + ATTACHED_S
            while not ask(engine, story(9, 600)).num_cached_tokens:
                assert time.monotonic() < deadline
            server.wait_idle()

    def test_killed_twenty_times_under_load(self, start_engine, start_server, truth):
        before = names()
        server = start_server("--l1-size-gb", "0.1")
        rng = random.Random(0)
        with start_engine(
            kv_transfer_config=server.transfer(), one_process=True, dtype="float32"
        ) as engine:
            for turn in range(20):
                numbers = [rng.randrange(10, 22) for _ in range(3)]
                pending = engine.submit([story(n, 600) for n in numbers], max_tokens=12)
                time.sleep(rng.random() * 2)
                server.kill()
                for number, answer in zip(numbers, engine.complete(pending, 120), strict=True):
                    assert answer.token_ids == truth[number].token_ids, turn
                server.start()
            server.wait(lambda status: status["engines"], ATTACHED_S)
            server.wait_idle()
        assert not [name for name in names() - before if "lmcache" in name.lower()]

    def test_an_engine_that_is_killed_is_let_go_at_once(self, start_engine, start_server):
        server = start_server("--l1-size-gb", "0.5")
        engine = start_engine(kv_transfer_config=server.transfer())
        engine.submit([story(n, 1500) for n in range(3)], max_tokens=64)
        time.sleep(1.5)
        engine._child.kill()
        server.wait(lambda status: not status["engines"] and not status["leaving"], 2.0)
        server.wait_idle(1.0)
        engine.close()


class TestLending:
    """The server copies, from and into the engine's own memory."""

    def test_a_second_engine_loads_what_the_first_computed(self, start_engine, start_server):
        server = start_server("--l1-size-gb", "1", "--supported-transfer-mode", "lmcache_driven")
        transfer = server.transfer(mp_transfer_mode="lmcache_driven")
        prompt = story(1, 1500)
        with start_engine(kv_transfer_config=transfer, one_process=True) as engine:
            cold, warm = ask(engine, prompt), ask(engine, prompt)
            assert warm.token_ids == cold.token_ids
            assert warm.num_cached_tokens > 1000
        server.wait(lambda status: not status["engines"])
        with start_engine(kv_transfer_config=transfer) as engine:
            other = ask(engine, prompt)
            assert other.token_ids == cold.token_ids
            assert other.num_cached_tokens == warm.num_cached_tokens
            server.wait_idle()
        assert server.stop() == 0

    def test_a_server_that_is_stopped_while_it_copies(self, start_engine, start_server, truth):
        """Its copies may go on when it wakes up, long after the engine has given up on them."""
        server = start_server("--l1-size-gb", "0.5")
        transfer = server.transfer(mp_transfer_mode="lmcache_driven")
        rng = random.Random(1)
        with start_engine(kv_transfer_config=transfer, one_process=True, dtype="float32") as engine:
            for turn in range(6):
                server.wait(lambda status: status["engines"], 8.0)
                numbers = [rng.randrange(10, 16) for _ in range(4)]
                pending = engine.submit([story(n, 600) for n in numbers], max_tokens=12)
                time.sleep(0.1 + rng.random() * 0.6)
                server.send(signal.SIGSTOP)
                for number, answer in zip(numbers, engine.complete(pending, 120), strict=True):
                    assert answer.token_ids == truth[number].token_ids, turn
                server.send(signal.SIGCONT)
                for number in numbers:
                    answer = ask(engine, story(number, 600))
                    assert answer.token_ids == truth[number].token_ids, turn
            server.wait_idle()


TELLS_REQUESTS = (0, 30)
"""The vLLM that asks which requests failed; before it, a model of several groups has no cache."""
PROMPTS = [story(n, 900) + ending for n in (1, 2) for ending in ("", " at", " never")]


@pytest.fixture(scope="module")
def hybrid(hybrid_dir):
    """How to start an engine whose layers look back differently far."""
    model = {"model": str(hybrid_dir), "dtype": "float32", "max_num_batched_tokens": 1000}
    return {**model, "one_process": True}


@pytest.fixture(scope="module")
def hybrid_truth(start_engine, hybrid):
    with start_engine(**hybrid) as engine:
        answers = [ask(engine, prompt).token_ids for prompt in PROMPTS]
    assert len(set(map(tuple, answers))) == len(answers), "it does not read its prompts"
    return answers


@pytest.mark.parametrize("mode", ["engine_driven", "lmcache_driven"])
def test_several_cache_groups(start_engine, start_server, hybrid, hybrid_truth, mode):
    server = start_server("--l1-size-gb", "0.5", "--supported-transfer-mode", "auto")
    transfer = server.transfer(mp_transfer_mode=mode)
    with start_engine(**hybrid, kv_transfer_config=transfer) as engine:
        major, minor, *_ = engine.stats()["version"].split(".")
        has_cache = (int(major), int(minor)) >= TELLS_REQUESTS
        cold = [ask(engine, prompt) for prompt in PROMPTS]
        warm = engine.generate(PROMPTS, max_tokens=12)
        assert [answer.token_ids for answer in cold + warm] == hybrid_truth * 2
        assert all((answer.num_cached_tokens > 500) == has_cache for answer in warm)
        assert cold[0].num_cached_tokens == 0
        server.wait_idle()


def test_each_rank_has_its_slice(start_engine, start_server, hybrid):
    server = start_server("--l1-size-gb", "0.5")
    options = {**hybrid, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    options |= {"one_process": False, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
    with start_engine(**options, kv_transfer_config=server.transfer()) as engine:
        major, minor, *_ = engine.stats()["version"].split(".")
        cold, warm = ask(engine, PROMPTS[0]), ask(engine, PROMPTS[0])
        assert warm.token_ids == cold.token_ids
        if (int(major), int(minor)) >= TELLS_REQUESTS:
            assert (cold.num_cached_tokens, warm.num_cached_tokens > 500) == (0, True)
            [attached] = server.wait_idle()["engines"]
            assert attached["movers"] == 2
    server.wait(lambda status: not status["engines"] and not status["leaving"])


def test_an_engine_starts_a_server_of_its_own(start_engine):
    port, http = free_port(), free_port()
    args = f"--l1-size-gb 0.5 --http-port {http}"
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.port": port,
            "lmcache.mp.autostart": True,
            "lmcache.mp.autostart.server_args": args,
            "lmcache.mp.nonblocking_lookup_status": False,
        },
    }
    with start_engine(kv_transfer_config=transfer, one_process=True) as engine:
        cold, warm = ask(engine, story(1, 600)), ask(engine, story(1, 600))
        assert warm.token_ids == cold.token_ids
        assert warm.num_cached_tokens > 0
        engine._child.kill()
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
        except OSError:
            break
        assert time.monotonic() < deadline, "it outlives the engine that started it"
        time.sleep(0.1)
