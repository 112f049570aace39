"""Real vLLM, a real server, and real storage behind it: KV that outlives all of them."""

from __future__ import annotations

import pytest
from harness import story
from mooncake_server import Contributor, Master, needs_mooncake
from redis_server import RedisServer
from redis_server import needs_server as needs_redis
from s3_server import S3Server, needs_s3
from served import ATTACHED_S, ask

pytestmark = pytest.mark.engine
GIB = 1 << 30


class Folder:
    """A file tier, which nothing needs to run for."""

    def __init__(self, path):
        self.url = f"file://{path}/tier?max_size=1GB"

    def kill(self):
        pass

    def start(self):
        pass


class Pool(Folder):
    """A Mooncake Store, which holds its objects in memory: who is killed loses them."""

    def __init__(self, path):
        self._master = Master(path)
        self._contributor = Contributor(path, self._master)
        self.url = self._master.url

    def end(self):
        self._contributor.kill()
        self._master.kill()


STORES = {
    "file": Folder,
    "redis": lambda path: RedisServer(path, "--appendonly", "yes", "--appendfsync", "always"),
    "s3": S3Server,
    "mooncake": Pool,
}


@pytest.fixture(
    params=[
        "file",
        pytest.param("redis", marks=needs_redis),
        pytest.param("s3", marks=needs_s3),
        pytest.param("mooncake", marks=needs_mooncake),
    ]
)
def store(request, tmp_path):
    """What a tier is kept in, which may be killed and started again."""
    made = STORES[request.param](tmp_path)
    yield made
    getattr(made, "end", made.kill)()


def written(server):
    """Wait until the tier has all that memory has."""
    server.wait(lambda status: server.sum("tier_written") >= status["l1"]["chunks"] > 0)


def test_everything_is_killed_and_starts_again(start_engine, start_server, store):
    server = start_server("--l1-size-gb", "0.5", "--l2", store.url)
    options = {"kv_transfer_config": server.transfer(), "one_process": True, "dtype": "float32"}
    with start_engine(**options) as engine:
        cold = ask(engine, story(10, 600))
        assert cold.num_cached_tokens == 0
        written(server)
        engine._child.kill()
    server.kill()
    store.kill()
    store.start()
    server.start()
    with start_engine(**options) as engine:
        server.wait(lambda status: status["engines"], ATTACHED_S)
        warm = ask(engine, story(10, 600))
        assert warm.num_cached_tokens > 500
        assert warm.token_ids == cold.token_ids
        assert "Prefetched" in server.log()
        server.wait_idle()


@pytest.mark.parametrize("ends", ["stop", "kill"])
def test_a_server_that_starts_again_has_what_its_tier_kept(
    start_engine, start_server, tmp_path, ends
):
    server = start_server("--l1-size-gb", "0.5", "--l2", Folder(tmp_path).url)
    with start_engine(
        kv_transfer_config=server.transfer(), one_process=True, dtype="float32"
    ) as engine:
        server.wait(lambda status: status["engines"], ATTACHED_S)
        cold = ask(engine, story(10, 600))
        assert cold.num_cached_tokens == 0
        if ends == "stop":
            assert server.stop() == 0
        else:
            written(server)
            server.kill()
        server.start()
        server.wait(lambda status: status["engines"], ATTACHED_S)
        warm = ask(engine, story(10, 600))
        assert warm.num_cached_tokens > 500
        assert warm.token_ids == cold.token_ids
        assert "Prefetched" in server.log()
        server.wait_idle()


@pytest.mark.parametrize("mode", ["engine_driven", "lmcache_driven"])
def test_a_prompt_four_times_as_large_as_memory_is_loaded_whole(
    start_engine, start_server, tmp_path, mode
):
    tier = ["--l2", Folder(tmp_path).url, "--chunk-size", "64"]
    server = start_server("--l1-size-gb", "0.5", *tier)
    transfer = server.transfer(mp_transfer_mode=mode)
    with start_engine(kv_transfer_config=transfer, one_process=True) as engine:
        prompt = story(11, 2000)
        cold = ask(engine, prompt)
        written(server)
        filled = server.get("status")["l1"]
        used = filled["capacity_bytes"] - filled["free_bytes"]
        assert server.stop() == 0
        server.restart_with("--l1-size-gb", f"{used / 4 / GIB:.6f}", *tier)
        server.wait(lambda status: status["engines"], ATTACHED_S)
        warm = ask(engine, prompt)
        assert warm.token_ids == cold.token_ids
        assert warm.num_cached_tokens > 1700
        assert server.get("status")["l1"]["capacity_bytes"] * 4 <= used
        server.wait_idle()
