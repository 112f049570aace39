"""What is ours beyond the contract: configuration, servers that come and go, what is refused."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import standin
from driver import Engine, prompt
from judge import ExecutorDied
from ours import fail_loads, in_process, with_server
from suite import queries

from lmcache.core.errors import ConfigError, LayoutError
from lmcache.core.mover import Mover

SCRIPTS = Path(__file__).resolve().parent / "scripts"


def found(engine, tokens, **about):
    """How much of a prompt is in the cache alone."""
    engine.forget()
    engine.submit(tokens, **about)
    engine.run()
    return queries(engine)[-1][1]


def run(words, env=None):
    """What another Python says."""
    options = {"capture_output": True, "text": True, "env": env}
    done = subprocess.run([sys.executable, *words], check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def native(request_id, tokens, **more):
    """A request as the query is given it."""
    about = {"request_id": request_id, "lora_task_id": None, **more}
    return SimpleNamespace(get_tokens=lambda beam: list(tokens), **about)


def output(request_id=0, *, blocks=0, position=0):
    """A pass in which a request of 130 tokens runs, or none does."""
    new = SimpleNamespace(
        request_id=request_id,
        new_tokens=[],
        new_block_ids=list(range(blocks)),
        computed_position=position,
        num_scheduled_tokens=2,
    )
    return SimpleNamespace(new_requests=[new] if request_id else [], cached_requests=[])


@pytest.fixture
def v1_3():
    with standin.installed("v1_3") as profile:
        yield profile


@pytest.fixture
def start(v1_3, monkeypatch):
    """An engine with its cache in-process, and other settings."""

    def start(settings=None, **options):
        return Engine(v1_3, in_process(monkeypatch, **settings or {}), **options)

    return start


class TestWhatIsStored:
    def test_the_tail_of_a_prompt_in_whole_blocks(self, start):
        with start({"SAVE_UNFULL_CHUNK": "True"}) as engine:
            assert found(engine, prompt(100)) == 0
            assert found(engine, prompt(100)) == 96
            assert found(engine, prompt(97)) == 96
            assert found(engine, prompt(96)) == 64

    def test_what_is_generated_if_it_is_wanted(self, start):
        for wanted, more in (("False", 0), ("True", 64)):
            with start({"SAVE_DECODE_CACHE": wanted}) as engine:
                request = engine.submit(prompt(70), new_tokens=100)
                engine.run()
                assert found(engine, (*request.tokens, 1)) == 64 + more

    @pytest.mark.parametrize("overlap", [False, True])
    def test_only_what_is_computed_of_what_is_generated(self, start, overlap):
        with start({"SAVE_DECODE_CACHE": "True"}, overlap=overlap, blocks=16) as engine:
            for seed in range(4):
                engine.submit(prompt(60, seed), new_tokens=5 + seed)
                engine.run()
                engine.forget()
            engine.audit()

    def test_nothing_if_so_it_is_said(self, start):
        with start({"FORCE_SKIP_SAVE": "1"}) as engine:
            assert found(engine, prompt(100)) == found(engine, prompt(100)) == 0

    def test_a_hit_that_is_too_small(self, start):
        with start({"MIN_RETRIEVE_TOKENS": "100"}) as engine:
            assert found(engine, prompt(70)) == found(engine, prompt(70)) == 0
            assert found(engine, prompt(140)) == 0
            assert found(engine, prompt(140)) == 128

    def test_pictures_whose_content_is_not_said(self, start, monkeypatch):
        request = importlib.import_module("standin_request").NativeRequest
        monkeypatch.setattr(request, "_multimodal_hashes", lambda self: None)
        with start() as engine:
            for _ in range(2):
                assert found(engine, prompt(100), media=((3, 20, (1, 2)),)) == 0
            assert found(engine, prompt(100)) == 0

    @pytest.mark.parametrize("name", ["multimodal_embedding", "prompt_embedding_table"])
    def test_what_stands_for_tokens_without_a_hash(self, start, name):
        with start() as engine:
            found(engine, prompt(130))
            scheduler = engine.leader._scheduler
            assert scheduler.matched_tokens(native(5, prompt(130), **{name: 1}), 0) == (0, False)
            assert not scheduler._tracked

    def test_an_adapter_is_its_engines(self, start, tmp_path):
        disk = {"LOCAL_DISK": str(tmp_path), "MAX_LOCAL_DISK_SIZE": "0.1"}
        with start(disk) as engine:
            assert found(engine, prompt(100), lora=1) == 0
            assert found(engine, prompt(100), lora=1) == 64
        with start(disk) as engine:
            assert found(engine, prompt(100), lora=1) == 0

    def test_another_engine_loads_it_from_a_slower_tier(self, start, tmp_path):
        disk = {"LOCAL_DISK": str(tmp_path), "MAX_LOCAL_DISK_SIZE": "0.1"}
        with start(disk, ranks=2, layers=1) as engine:
            assert found(engine, prompt(200)) == 0
        with start(disk, ranks=2, layers=1) as engine:
            assert found(engine, prompt(200)) == 192
            engine.audit()

    def test_what_partial_reuse_costs_is_said(self, start, heard):
        with start(partial=True) as engine:
            found(engine, prompt(100))
            for seed in (5, 6):
                engine.submit((*prompt(40), *prompt(60, seed)))
                engine.run()
                assert queries(engine)[-1] == (40, 0)
            said = [r.getMessage() for r in heard.records]
            assert sum(text.startswith("a prompt of which") for text in said) == 1
        assert "nothing was loaded for 2 prompts with a partial match" in heard.text

    def test_a_chunk_is_whole_blocks(self, start):
        with start({"CHUNK_SIZE": "50"}) as engine:
            assert found(engine, prompt(100)) == 0
            assert found(engine, prompt(100)) == 64
            engine.audit()

    @pytest.mark.parametrize("named", [True, False])
    def test_hosts_may_keep_a_model_in_different_folders(self, start, tmp_path, named):
        name = {"MODEL_ID": "tiny"} if named else {}
        disk = {"LOCAL_DISK": str(tmp_path), "MAX_LOCAL_DISK_SIZE": "0.1", **name}
        with start(disk, args={"model": "/here/tiny"}) as engine:
            assert found(engine, prompt(100)) == 0
        with start(disk, args={"model": "/there/tiny"}) as engine:
            assert found(engine, prompt(100)) == 64 * named

    def test_a_place_without_a_block(self, start):
        """What lies before it is stored, and what lies behind it is not."""
        with start() as engine:
            output_of = engine.ranks[0].reporter.output

            def with_a_hole(batch):
                told = output_of(batch)
                for data in told.new_requests:
                    data.new_block_ids[3] = -1
                return told

            engine.ranks[0].reporter.output = with_a_hole
            assert found(engine, prompt(200)) == 0
            engine.ranks[0].reporter.output = output_of
            assert found(engine, prompt(200)) == 64
            engine.audit()

    def test_more_than_there_is_room_for(self, start):
        """A chunk takes 4 kB; the slab has room for few of them beside its own needs."""
        with start({"MAX_LOCAL_CPU_SIZE": "0.0003"}, layers=1) as engine:
            for seed in range(40):
                engine.submit(prompt(200, seed), new_tokens=2)
                engine.run()
                engine.forget()
            assert found(engine, prompt(200, 39)) == 192
            assert found(engine, prompt(200, 0)) == 0
            engine.audit()


class TestPromises:
    def test_what_was_promised_cannot_be_evicted(self, start):
        with start() as engine:
            found(engine, prompt(130))
            engine.forget()
            decider = engine.leader._scheduler._joining.current().decider
            engine.hooks.prepared = lambda executor: decider.clear()
            engine.submit(prompt(130))
            engine.run()
            assert queries(engine)[-1] == (0, 128)
            engine.hooks.prepared = lambda executor: None

    def test_what_one_of_four_ranks_lacks_is_not_there(self, start, monkeypatch):
        with start(ranks=4, layers=1) as engine:
            publish = Mover.publish
            on_three = lambda mover, moves: publish(mover, moves) if mover._slice != 2 else None  # noqa: E731
            monkeypatch.setattr(Mover, "publish", on_three)
            assert found(engine, prompt(130)) == found(engine, prompt(130)) == 0
            monkeypatch.setattr(Mover, "publish", publish)
            assert found(engine, prompt(130)) == 0
            assert found(engine, prompt(130)) == 128
            engine.audit()

    def test_a_load_that_fails_on_one_rank(self, start, monkeypatch):
        """None of them goes on with what is not there."""
        with start(ranks=2, layers=1) as engine:
            found(engine, prompt(130))
            engine.forget()
            fail_loads(monkeypatch, rank=1)
            engine.submit(prompt(130))
            with pytest.raises(ExecutorDied, match="cannot be loaded"):
                engine.run()
            engine.abandon()

    def test_a_cache_that_breaks_is_no_reason_to_answer(self, start):
        with start() as engine:
            found(engine, prompt(130))
            engine.forget()
            worker = engine.ranks[0].manager.worker
            worker._worker._grants.current = lambda attachment: None
            engine.submit(prompt(130))
            with pytest.raises(ExecutorDied, match="the cache is gone"):
                engine.run()
            engine.abandon()

    def test_a_chunk_that_was_changed(self, start):
        with start() as engine:
            found(engine, prompt(130))
            engine.forget()
            mover = engine.ranks[0].manager.worker._worker._grants.latest.mover
            mover.load = lambda moves, region, after: (0, list(moves))
            engine.submit(prompt(130))
            with pytest.raises(ExecutorDied, match="2 chunks that were promised"):
                engine.run()
            engine.abandon()

    def test_an_error_of_ours_while_a_pass_is_planned(self, start):
        with start() as engine:
            found(engine, prompt(130))
            engine.forget()
            engine.leader._scheduler.build = lambda output: 1 / 0
            engine.submit(prompt(20, 1))
            engine.run()  # nobody was promised anything
            engine.submit(prompt(130))
            with pytest.raises(ExecutorDied, match="blocks were promised and are lost"):
                engine.run()
            engine.abandon()

    def test_what_an_error_has_lost_is_not_stored(self, start):
        """A pass was not planned, so it is not known which blocks came with it."""
        with start({"CHUNK_SIZE": "32"}) as engine:
            cache = engine.leader._scheduler._joining.current()
            reserve, cache.reserve = cache.reserve, lambda *args, **more: 1 / 0
            for seed in range(2):
                engine.submit(prompt(64, seed), new_tokens=40)
            engine.step()
            cache.reserve = reserve
            engine.run()
            engine.audit()
            assert engine.leader.errors == 1

    def test_errors_of_ours_keep_nothing_leased(self, start):
        with start() as engine:
            found(engine, prompt(130))
            engine.leader.errors = 3
            scheduler = engine.leader._scheduler
            request = native(5, prompt(130))
            assert scheduler.matched_tokens(request, 0) == (128, False)
            engine.leader.request_finished(request, [])
            assert not scheduler._tracked

    def test_what_a_query_that_breaks_off_has_asked_for_is_given_back(self, start, monkeypatch):
        with start() as engine:
            found(engine, prompt(130))
            cache, given_back = engine.leader._scheduler._joining.current(), []
            with monkeypatch.context() as patch:
                patch.setattr(cache, "lookup", lambda *args: 1 / 0)
                patch.setattr(cache, "release", lambda *args: given_back.append(args))
                request = native(5, prompt(130))
                assert engine.leader.get_num_new_matched_tokens(request, 0) == (0, False)
            assert given_back == [("5", None)]

    def test_errors_of_ours_in_a_query_are_misses(self, start):
        with start() as engine:
            engine.leader._scheduler.matched_tokens = lambda request, local: 1 / 0
            for _ in range(5):
                assert found(engine, prompt(130)) == 0
            assert engine.leader.errors == 3

    def test_what_a_request_without_a_word_was_promised_is_given_back(self, start):
        with start() as engine:
            found(engine, prompt(130))
            engine.forget()
            engine.leader._scheduler._tells = False
            request = native(5, prompt(130))
            assert engine.leader.get_num_new_matched_tokens(request, 0) == (128, False)
            engine.submit(prompt(20, 1), new_tokens=2)
            engine.run()
            assert not engine.leader._scheduler._tracked
            # it is not to come back as if nothing had happened
            step = engine.leader._scheduler.build(output(5, blocks=5, position=0))
            assert step.broken

    def test_a_request_that_waits_for_too_long(self, main_v2, monkeypatch):
        with Engine(main_v2, in_process(monkeypatch, PIN_TIMEOUT_SEC="1")) as engine:
            found(engine, prompt(130))
            scheduler = engine.leader._scheduler
            assert scheduler.matched_tokens(native(5, prompt(130)), 0) == (128, False)
            assert scheduler.build(output()) is None
            assert scheduler._tracked
            scheduler._tracked[5].since -= 2
            scheduler.build(output())
            assert not scheduler._tracked

    @pytest.mark.parametrize(
        ("start_", "end", "loaded"),
        [(100, 128, 4), (96, 128, 3), (64, 64, 4), (0, 64, 2), (0, 128, 0)],
    )
    def test_an_offer_that_is_taken_in_part(self, start, start_, end, loaded):
        """Not always in whole blocks: of the last one, the pass writes what was not wanted."""
        with start() as engine:
            found(engine, prompt(130))
            scheduler = engine.leader._scheduler
            assert scheduler.matched_tokens(native(5, prompt(130)), 0) == (128, False)
            scheduler.give_up(5, start_, end)
            step = scheduler.build(output(5, blocks=5, position=0))
            moves = [move for _, moves in step.loads for move in moves] if step else []
            assert sum(len(move.engine_pages) for move in moves) == loaded
            scheduler.forget(5)
            scheduler._cache.cancel([], [])
            engine.abandon()

    def test_fewer_blocks_than_were_promised(self, start):
        with start() as engine:
            found(engine, prompt(130))
            scheduler = engine.leader._scheduler
            assert scheduler.matched_tokens(native(5, prompt(130)), 0) == (128, False)
            assert "3 blocks" in scheduler.build(output(5, blocks=3, position=0)).broken
            engine.abandon()


class TestServers:
    @pytest.fixture
    def serve(self, tmp_path):
        """Starts a server, of its own for each call."""
        started = []

        def serve():
            served = sys.modules["served"]
            log = tmp_path / f"server{len(started)}.log"
            started.append(served.Server(log, "--l1-size-gb", "0.1", "--chunk-size", "64"))
            return started[-1]

        yield serve
        for server in started:
            if server._process is not None:
                server.stop()

    def begin(self, profile, monkeypatch, server, **options):
        plug = with_server(monkeypatch, server, settle=lambda: None)
        return Engine(profile, plug, **options)

    @staticmethod
    def until_joined(engine, server):
        server.wait(lambda status: len(status["engines"]) == 1)
        while engine.leader._scheduler._joining.current() is None:
            pass

    def test_the_engine_may_come_first(self, profile, monkeypatch, serve):
        server = serve()
        with self.begin(profile, monkeypatch, server) as engine:
            assert found(engine, prompt(130)) == found(engine, prompt(130)) == 0
            server.start()
            self.until_joined(engine, server)
            assert found(engine, prompt(130)) == 0
            server.wait_idle()
            assert found(engine, prompt(130)) == 128
            engine.audit()

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_a_server_that_is_killed_and_started_again(self, profile, monkeypatch, serve, ranks):
        server = serve().start()
        with self.begin(profile, monkeypatch, server, ranks=ranks, layers=1) as engine:
            self.until_joined(engine, server) if profile.waits_for_start else None
            is_over = threading.Event()

            def trouble():
                for _ in range(4):
                    is_over.wait(0.3)
                    server.kill()
                    is_over.wait(0.2)
                    server.start()
                is_over.set()

            thread = threading.Thread(target=trouble)
            thread.start()
            rounds = 0
            while not is_over.is_set():
                for seed in range(3):
                    engine.submit(prompt(140, seed), new_tokens=3)
                engine.run()
                engine.forget()
                rounds += 1
            thread.join()
            assert rounds > 4
            self.until_joined(engine, server)
            found(engine, prompt(140))
            server.wait_idle()
            assert found(engine, prompt(140)) == 128
            engine.audit(last=9)
            server.wait_idle()

    @pytest.mark.parametrize("is_noticed", [False, True])
    def test_a_server_that_dies_with_a_promise(self, profile, monkeypatch, serve, is_noticed):
        """Between the query and the load; what it promised is loaded all the same."""
        server = serve().start()
        with self.begin(profile, monkeypatch, server, ranks=2, layers=1) as engine:
            self.until_joined(engine, server) if profile.waits_for_start else None
            found(engine, prompt(130))
            server.wait_idle()
            engine.forget()
            joining = engine.leader._scheduler._joining
            met = threading.Barrier(2)

            def die(executor):
                if executor.manager.scheduler:
                    server.kill()
                    while is_noticed and joining.current():
                        pass
                met.wait(10)

            engine.hooks.prepared = die
            engine.submit(prompt(130))
            engine.step()
            engine.hooks.prepared = lambda executor: None
            engine.run()
            assert queries(engine)[-1] == (0, 128)

    def test_a_server_that_ends_with_a_promise(self, profile, monkeypatch, serve):
        """It waits until what it promised is loaded."""
        server = serve().start()
        with self.begin(profile, monkeypatch, server) as engine:
            found(engine, prompt(130))
            server.wait_idle()
            engine.forget()
            grants = engine.ranks[0].manager.worker._worker._grants

            def end(executor):
                server.send(15)
                while grants.latest:
                    pass

            engine.hooks.prepared = end
            engine.submit(prompt(130))
            engine.step()
            engine.hooks.prepared = lambda executor: None
            engine.run()
            assert queries(engine)[-1] == (0, 128)

    def test_a_server_that_hangs(self, profile, monkeypatch, serve):
        monkeypatch.setenv("LMCACHE_MQ_TIMEOUT", "0.2")
        server = serve().start()
        with self.begin(profile, monkeypatch, server) as engine:
            found(engine, prompt(130))
            server.wait_idle()
            server.send(19)
            for _ in range(5):
                assert found(engine, prompt(130)) == 0
            server.send(18)

    def test_two_engines_of_one_server(self, profile, monkeypatch, serve):
        server = serve().start()
        with self.begin(profile, monkeypatch, server) as one:
            found(one, prompt(130))
            server.wait_idle()
            with Engine(profile, one.plug) as other:
                assert found(other, prompt(130)) == 128
                other.audit()

    def test_a_server_that_will_never_have_it(self, profile, monkeypatch, serve):
        server = serve().start()
        monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "32")
        if profile.waits_for_start:
            with pytest.raises(ExecutorDied, match="ConfigError"):
                self.begin(profile, monkeypatch, server, bs=32)
        else:
            with self.begin(profile, monkeypatch, server, bs=32) as engine:
                assert found(engine, prompt(130)) == found(engine, prompt(130)) == 0
        importlib.import_module("lmcache.integration.tensorrt_llm").destroy_engine()


class TestSettings:
    @pytest.fixture
    def settings(self, v1_3):
        load = importlib.import_module("lmcache.adapters.trtllm.settings").load_settings

        def settings(server_url=None):
            api = sys.modules["tensorrt_llm.llmapi.llm_args"]
            config = api.KvCacheConnectorConfig(connector="lmcache-mp", server_url=server_url)
            return load(api.TorchLlmArgs(model="tiny", kv_connector_config=config))

        return settings

    def test_where_the_server_is(self, settings, monkeypatch):
        assert settings().endpoint == "tcp://localhost:5555"
        monkeypatch.setenv("LMCACHE_SERVER_URL", "there:1")
        assert settings().endpoint == "tcp://there:1"
        assert settings("ipc:///tmp/x").endpoint == "ipc:///tmp/x"
        with pytest.raises(ConfigError, match=r"grpc://here.*expected tcp:// or ipc://"):
            settings("grpc://here:1")

    def test_what_tensorrt_llm_passes_on(self, settings, monkeypatch):
        monkeypatch.setenv("TLLM_LMCACHE_CHUNK_SIZE", "96")
        monkeypatch.setenv("TRTLLM_LMCACHE_SERVER_URL", "there:1")
        monkeypatch.setenv("TLLM_LMCACHE_MAX_LOCAL_CPU_SIZE", "2")
        monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "1")
        try:
            said = settings()
        finally:
            del os.environ["LMCACHE_CHUNK_SIZE"], os.environ["LMCACHE_SERVER_URL"]
        assert (said.loaded.config.chunk_size, said.endpoint) == (96, "tcp://there:1")
        assert said.loaded.config.max_local_cpu_size == 1

    @pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
    def test_seconds_that_are_none(self, settings, monkeypatch, text):
        monkeypatch.setenv("LMCACHE_MQ_TIMEOUT", text)
        with pytest.raises(ConfigError, match="LMCACHE_MQ_TIMEOUT"):
            settings()

    def test_a_key_nobody_knows(self, settings, monkeypatch):
        monkeypatch.setenv("LMCACHE_CHUNKSIZE", "64")
        with pytest.raises(ConfigError, match="LMCACHE_CHUNK_SIZE"):
            settings()


class TestRefusals:
    @pytest.fixture
    def check(self, v1_3):
        return importlib.import_module("lmcache.adapters.trtllm.translate").check_args

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("pipeline_parallel_size", 2),
            ("context_parallel_size", 2),
            ("max_beam_width", 4),
            ("enable_attention_dp", True),
            ("kv_cache_config", {"host_cache_size": 1}),
            ("kv_cache_config", {"max_attention_window": [512]}),
        ],
    )
    def test_ways_to_run(self, check, option, value):
        api = sys.modules["tensorrt_llm.llmapi.llm_args"]
        check(api.TorchLlmArgs(model="tiny"))
        with pytest.raises(ConfigError, match=option):
            check(api.TorchLlmArgs(model="tiny", **{option: value}))

    def test_pools_whose_scales_are_elsewhere(self, check, tmp_path):
        api = sys.modules["tensorrt_llm.llmapi.llm_args"]
        cache = api.KvCacheConfig(dtype="nvfp4")
        with pytest.raises(ConfigError, match="nvfp4"):
            check(api.TorchLlmArgs(model="tiny", kv_cache_config=cache))
        (tmp_path / "hf_quant_config.json").write_text(
            '{"quantization": {"kv_cache_quant_algo": "NVFP4"}}'
        )
        with pytest.raises(ConfigError, match="nvfp4"):
            check(api.TorchLlmArgs(model=str(tmp_path)))

    def test_two_groups_of_layers(self, main_v2, monkeypatch):
        with pytest.raises(ExecutorDied, match="2 groups of layers"):
            Engine(main_v2, in_process(monkeypatch), windows=(None, 64), ranks=2)
        importlib.import_module("lmcache.integration.tensorrt_llm").destroy_engine()

    @pytest.mark.parametrize("error", [LayoutError, MemoryError])
    def test_a_rank_that_cannot_is_not_waited_for(self, v1_3, monkeypatch, error):
        worker = importlib.import_module("lmcache.adapters.trtllm.worker").Worker
        opened = worker.open

        def open_(self, *args):
            if self._rank == 1:
                raise error("not here")
            opened(self, *args)

        monkeypatch.setattr(worker, "open", open_)
        before = pipes()
        with pytest.raises(ExecutorDied, match="not here"):
            Engine(v1_3, in_process(monkeypatch), ranks=2)
        importlib.import_module("lmcache.integration.tensorrt_llm").destroy_engine()
        assert pipes() == before

    def test_ranks_that_share_no_pipes(self, v1_3, monkeypatch):
        module = importlib.import_module("lmcache.adapters.trtllm.asking")
        monkeypatch.setattr(module, "_pipes_of", lambda engine_id: Path("/nowhere", engine_id))
        with pytest.raises(ExecutorDied, match="ranks cannot be asked: .*/nowhere/"):
            Engine(v1_3, in_process(monkeypatch), ranks=2)
        importlib.import_module("lmcache.integration.tensorrt_llm").destroy_engine()


def pipes():
    return set(Path("/dev/shm").glob("lmcache-ask-*"))


def test_no_file_is_left_while_an_engine_runs(v1_3, monkeypatch):
    before = pipes()
    with Engine(v1_3, in_process(monkeypatch), ranks=2):
        assert pipes() == before


class TestFrontDoor:
    def test_without_tensorrt_llm(self):
        code = (
            "from lmcache.integration.tensorrt_llm import destroy_engine as end; end(); end()\n"
            "import sys; print('torch' in sys.modules)"
        )
        assert run(["-c", code]).strip() == "False"

    def test_an_engine_that_is_destroyed_twice(self, start):
        engine = start()
        found(engine, prompt(130))
        for _ in range(2):
            importlib.import_module("lmcache.integration.tensorrt_llm").destroy_engine()
        engine.abandon()
        engine.crew.close()

    def test_an_engine_that_was_dropped(self, start):
        engine = start()
        found(engine, prompt(130))
        engine.abandon()
        engine.crew.close()
        live = importlib.import_module("lmcache.adapters.trtllm.meeting").LIVE
        assert len(live) == 2
        del engine
        assert len(live) == 2
        importlib.import_module("lmcache.integration.tensorrt_llm").destroy_engine()
        assert not live

    def test_constructors_that_begin_anew(self, v1_3):
        name = importlib.import_module("lmcache.adapters.trtllm.meeting").engine_id_for
        args = object()
        lost = name(args, "worker")
        worker, scheduler = name(args, "worker"), name(args, "scheduler")
        assert lost != worker == scheduler
        assert name(args, "scheduler") != scheduler

    @pytest.mark.parametrize("name", ["in_process", "with_server"])
    def test_a_users_script(self, name):
        """As in LMCache's documents, but for what runs the model."""
        env = {key: text for key, text in os.environ.items() if key != "PYTHONHASHSEED"}
        env |= {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "2.0"}
        script = [SCRIPTS / "standin_first.py", SCRIPTS / f"{name}.py"]
        assert len(run(script, env).strip()) == 64

    def test_one_field_of_a_preset_is_another(self, v1_3, monkeypatch):
        plug = in_process(monkeypatch)
        api = sys.modules["tensorrt_llm.llmapi.llm_args"]
        changed = api.KvCacheConnectorConfig(
            connector="lmcache-mp",
            connector_module="lmcache.integration.tensorrt_llm.tensorrt_adapter",
            connector_scheduler_class="LMCacheKvConnectorScheduler",
            connector_worker_class="LMCacheKvConnectorWorker",
        )
        with Engine(v1_3, plug, args={"kv_connector_config": changed}) as engine:
            assert found(engine, prompt(130)) == 0
            assert found(engine, prompt(130)) == 128
