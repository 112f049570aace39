"""The stand-in itself: what each version offers, refuses and reports, and whether it has teeth."""

from __future__ import annotations

import importlib
import pickle
import sys
import threading
from types import SimpleNamespace

import pytest
import standin
import standin_comm
import standin_layout
import torch
from driver import Engine, prompt
from fake_model import Pool, digests_of
from fake_stream import FakeStream
from judge import Judge
from plug import Plug, mentions
from pydantic import ValidationError
from radix import Blocks
from standin_profiles import NEW_PATH, OLD_PATH

on = pytest.mark.parametrize
EXPLICIT = {
    "connector_module": "minimal",
    "connector_scheduler_class": "Scheduler",
    "connector_worker_class": "Worker",
}


def api():
    return sys.modules["tensorrt_llm.llmapi.llm_args"]


# --- L: configuration


def test_explicit_classes_work_everywhere(profile):
    config = api().KvCacheConnectorConfig(**EXPLICIT)
    assert {name: getattr(config, name) for name in EXPLICIT} == EXPLICIT
    assert hasattr(config, "server_url") == profile.server_url


def test_presets_are_known_where_there_are_any(profile):
    config = api().KvCacheConnectorConfig
    if not profile.presets:
        with pytest.raises(ValidationError, match="connector\n.*Extra inputs"):
            config(connector="lmcache")
        with pytest.raises(ValidationError, match="Extra inputs"):
            config(**EXPLICIT, server_url="tcp://localhost:1")
        return
    made = config(connector="lmcache-mp", connector_worker_class="Mine", server_url="tcp://h:1")
    assert made.connector_module == "lmcache.integration.tensorrt_llm.tensorrt_mp_adapter"
    assert made.connector_scheduler_class == "LMCacheMPKvConnectorScheduler"
    assert (made.connector_worker_class, made.server_url) == ("Mine", "tcp://h:1")
    with pytest.raises(
        ValidationError, match="unknown connector 'nobody'; known are kvbm, lmcache"
    ):
        config(connector="nobody")


def test_a_class_that_is_missing_is_named(profile):
    without = {name: value for name, value in EXPLICIT.items() if "worker" not in name}
    with pytest.raises(ValidationError, match="connector_worker_class"):
        api().KvCacheConnectorConfig(**without)


def test_an_unknown_field_is_refused(profile):
    with pytest.raises(ValidationError, match="Extra inputs"):
        api().KvCacheConnectorConfig(**EXPLICIT, port=5)


def test_the_registry_is_where_the_new_path_is(profile):
    name = "tensorrt_llm._torch.pyexecutor.connectors.registry"
    assert (name in sys.modules) == (profile.path == NEW_PATH)
    if profile.presets:
        assert set(importlib.import_module(name).CONNECTOR_REGISTRY) == set(profile.presets)


def test_one_path_exists(profile):
    for path in (OLD_PATH, NEW_PATH):
        if path == profile.path:
            assert importlib.import_module(path).KvCacheConnectorWorker
        else:
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(path)


def test_nothing_stays_installed():
    with standin.installed("main_v2"):
        assert "tensorrt_llm" in sys.modules
        importlib.import_module("minimal")
    assert not standin.of("tensorrt_llm", "minimal")


@on(
    ("changes", "since"),
    [
        ({"pipeline_parallel_size": 2}, "v1_1"),
        ({"speculative_config": {}}, "v1_1"),
        ({"context_parallel_size": 2}, "v1_3"),
        ({"max_beam_width": 2}, "v1_3"),
    ],
)
def test_what_is_refused(profile, changes, since):
    versions = list(standin.PROFILES)
    start = lambda: Engine(profile, Plug("minimal"), args=changes)  # noqa: E731
    if versions.index(profile.name) >= versions.index(since):
        with pytest.raises(NotImplementedError, match="with a KV cache connector"):
            start()
    else:
        start().crew.close()


def test_graphs_are_refused_by_the_oldest(profile):
    changes = {"cuda_graph_config": {}}
    if profile.cuda_graphs:
        with Engine(profile, Plug("minimal"), args=changes) as engine:
            assert engine.args.cuda_graph_config == {}
    else:
        with pytest.raises(NotImplementedError, match="CUDA graphs"):
            Engine(profile, Plug("minimal"), args=changes)


def test_constructors_run_side_by_side(profile):
    minimal = importlib.import_module("minimal")
    both = threading.Barrier(2)

    class Waits:
        def __init__(self, llm_args):
            both.wait(5)
            super().__init__(llm_args)

    minimal.Scheduler = type("Scheduler", (Waits, minimal.Scheduler), {})
    minimal.Worker = type("Worker", (Waits, minimal.Worker), {})
    with Engine(profile, Plug("minimal")) as engine:
        assert isinstance(engine.leader, Waits)


def test_a_constructor_that_fails_stops_the_start(profile):
    minimal = importlib.import_module("minimal")
    minimal.Worker = lambda llm_args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Engine(profile, Plug("minimal"))


def test_only_the_leader_has_a_scheduler(profile):
    with Engine(profile, Plug("minimal"), ranks=2) as engine:
        assert [rank.manager.scheduler is None for rank in engine.ranks] == [False, True]
        assert [rank.manager.worker.rank for rank in engine.ranks] == [0, 1]


# --- what a connector is told


def test_the_abstract_methods(profile):
    module = sys.modules[profile.path]
    assert module.KvCacheConnectorScheduler.__abstractmethods__ == {
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "request_finished",
    }
    assert module.KvCacheConnectorWorker.__abstractmethods__ == {
        "register_kv_caches",
        "start_load_kv",
        "wait_for_layer_load",
        "save_kv_layer",
        "wait_for_save",
        "get_finished",
    }
    offers = {
        "wait_for_initialization": profile.waits_for_start,
        "cancel_load": profile.main,
        "request_reset": profile.main,
    }
    for name, is_there in offers.items():
        assert hasattr(module.KvCacheConnectorScheduler, name) == is_there
    assert hasattr(module.KvCacheConnectorWorker, "register_kv_cache_layout") == profile.main
    graphs = hasattr(module.KvCacheConnectorWorker, "register_forward_pass_callable")
    assert graphs == profile.cuda_graphs


def first_report(profile, **wish):
    """What the scheduler is told about a new request."""
    with Engine(profile, Plug("minimal")) as engine:
        seen, build = [], engine.leader.build_connector_meta
        engine.leader.build_connector_meta = lambda output: seen.append(output) or build(output)
        engine.submit(prompt(100), **wish)
        engine.run()
        return seen[0].new_requests[0]


def test_a_report_has_the_fields_of_its_version(profile):
    salt = {"cache_salt_id": 7, "cache_salt": "seven", None: None}[profile.salt]
    data = first_report(profile, salt=salt, priority=35)
    assert tuple(vars(data)) == profile.fields
    if profile.salt:
        assert getattr(data, profile.salt) == salt
    if "priorities" in profile.fields:
        assert data.priorities == (None if profile.layouts else [35] * 4)
    if "block_hashes" in profile.fields:
        assert len(set(data.block_hashes)) == (0 if profile.layouts else 3)
        groups = [data.new_block_ids] if profile.layouts else []
        assert data.new_block_ids_by_layer_group == groups
    assert data.new_block_ids
    assert first_report(profile, priority=None).new_tokens == list(prompt(100))


def test_a_request_shows_what_is_bound_and_no_more(profile):
    with Engine(profile, Plug("minimal")) as engine:
        media = ((3, 20, (1, 2)),)
        salt = 7 if profile.salt else None
        request = engine.submit(prompt(10), salt=salt, lora=5, media=media)
        native, python = request.native(profile.salt), request.python(profile.salt)
        for view in (native, python):
            assert view.request_id == request.id
            assert view.get_tokens(0) == list(prompt(10))
            assert (view.prompt_len, view.lora_task_id) == (10, 5)
            assert view.multimodal_hashes == [[1, 2]]
            assert (view.multimodal_positions, view.multimodal_lengths) == ([3], [20])
            assert view.is_dummy_request is False
            names = [n for n in ("cache_salt", "cache_salt_id") if hasattr(view, n)]
            assert names == [profile.salt] * bool(profile.salt)
            with pytest.raises(AttributeError, match="is_generation_only_request"):
                _ = view.is_generation_only_request
            with pytest.raises(AttributeError, match="sets nothing"):
                view.seen = True
        assert python.py_request_id == request.id
        with pytest.raises(AttributeError, match="py_request_id"):
            _ = native.py_request_id


# --- whether it has teeth


def test_contents_depend_on_all_that_they_should():
    base = digests_of(prompt(40))
    others = {
        "token": digests_of((9, *prompt(40)[1:])),
        "salt": digests_of(prompt(40), salt=1),
        "lora": digests_of(prompt(40), lora=1),
    }
    assert all((base != other).all() for other in others.values())
    image = digests_of(prompt(40), media=((10, 5, (1,)),))
    assert (base[:10] == image[:10]).all()
    assert (base[10:] != image[10:]).all()
    pools = [Pool(4, [0, 1]), Pool(4, [0, 1], rank=1)]
    parts = [part for pool in pools for part in pool.expected(base).flatten(1, 2).unbind(1)]
    assert len({bytes(part.numpy().tobytes()) for part in parts}) == 2 * 2 * 2


@on("split", [True, False])
def test_a_pool_knows_what_is_wrong_and_what_is_strange(split):
    pool = Pool(8, [0, 1], split=split)
    digests, table = digests_of(prompt(70)), [5, 2, 7]
    places = list(range(70))
    assert pool.wrong(digests, places, table) == places
    pool.write(digests, places, table)
    assert pool.wrong(digests, places, table) == []
    assert pool.wrong(digests, places, [2, 5, 7]) == list(range(64))
    assert pool.strange() == []
    pool.view[2, 1, 0, 1, 3] += 1
    assert pool.wrong(digests, places, table) == [32 + 3]
    assert (pool.strange(), pool.strange({2})) == ([2], [])


def test_no_two_frees_look_the_same():
    pool = Pool(2, [0])
    before = pool.view.clone()
    pool.poison([1])
    assert torch.equal(pool.view[0], before[0])
    assert not (pool.view[1] == before[1]).any()


def test_the_tensor_of_version_1_is_by_block():
    pool = Pool(8, [0, 1, 2], dtype=torch.bfloat16)
    tensor = pool.tensor()
    assert (tuple(tensor.shape), tensor.dtype) == ((8, 3, 2, 2 * 32 * 4), torch.bfloat16)
    tensor[3].view(torch.uint8).fill_(1)
    assert pool.strange() == [3]


def test_a_layout_leads_to_the_same_bytes():
    for split, regions in ((False, 1), (True, 4)):
        pool = Pool(8, [0, 2], split=split)
        group = pool.group(0, None)
        assert len(group.regions) == regions
        assert group.bytes_per_page == pool.view[0].numel()
        for region in group.regions:
            assert region.as_tensor(torch.float32).shape == (8, region.size // 4)
            region.slot_tensor(6).fill_(1)
            with pytest.raises(IndexError):
                region.slot_tensor(-1)
        assert pool.strange() == [6]
        assert {layer for r in group.regions for layer, _, _ in r.buffers} == {0, 2}
    assert standin_layout.valid_page_slots([-1, 4]) == [(1, 4)]
    layout = standin_layout.KvCacheLayout(32, torch.float32, (group,))
    with pytest.raises(ValueError, match="no single tensor"):
        layout.as_single_pool_tensor()


def test_a_stream_waits_until_it_is_waited_for():
    one, two, done = FakeStream(), FakeStream(), []
    one.enqueue(lambda: done.append(1))
    two.wait_stream(one)
    two.enqueue(lambda: done.append(2))
    one.enqueue(lambda: done.append(3))
    assert done == []
    event = two.record_event()
    assert event.query() is False
    assert event.query() is True
    assert done == [1, 2]
    assert one.query() is False
    one.synchronize()
    assert done == [1, 2, 3]
    with pytest.raises(AttributeError, match="no 'cuda_stream'"):
        _ = one.cuda_stream


def test_blocks_are_found_by_their_prefix():
    blocks = Blocks(8, 32)
    table = [blocks.take()[0] for _ in range(4)]
    blocks.learn("me", prompt(128), 128, table)
    assert blocks.release(table) == []
    assert blocks.match("me", prompt(128)) == (table[:3], None, 0)
    assert blocks.match("me", prompt(129)) == (table, None, 0)
    assert blocks.match("you", prompt(129)) == ([], None, 0)
    longer = (*prompt(40), *prompt(60, seed=1))
    assert blocks.match("me", longer, partial=True) == (table[:1], table[1], 8)
    assert blocks.room == 8
    taken = [blocks.take() for _ in range(8)]
    assert [lost for _, lost in taken] == [False] * 4 + [True] * 4
    # the end of a prefix goes first, or the rest of it would be of no use
    assert [block for block, _ in taken[4:]] == table[::-1]


def test_ranks_that_do_not_meet_are_noticed():
    judge = Judge()
    world = standin_comm.World(2, judge, patience_s=0.1)
    with pytest.raises(standin_comm.OutOfStep, match="dead-lock in allgather"):
        standin_comm.Communicator(0, world).allgather(1)
    with pytest.raises(AssertionError, match="dead-lock: dead-lock in allgather"):
        judge.settle()


def test_a_thread_of_no_rank_has_no_rank():
    with pytest.raises(RuntimeError, match="belongs to no rank"):
        standin_comm.mpi_rank()
    world = standin_comm.World(1, Judge())
    with standin_comm.bound(standin_comm.Communicator(0, world)):
        assert standin_comm.mpi_rank() == 0
        assert standin_comm.mpi_broadcast({"a": 1}) == {"a": 1}


def test_what_is_remembered_is_found():
    ours = type("Ours", (), {"__module__": "minimal"})
    theirs = type("Theirs", (), {"__module__": "other"})
    root, foreign = ours(), theirs()
    root.table = {"a": [(3, {"b": 7})]}
    root.names, root.loop = ["8"], root
    foreign.id, root.foreign, root._metadata = 9, foreign, 9
    found = mentions(root, {7, 8, 9}, ("minimal",))
    assert sorted(found) == ["Ours.names[] 8", "Ours.table[][][][] 7"]


def test_what_is_sent_is_a_copy(profile):
    with Engine(profile, Plug("minimal")) as engine:
        sent, worker = SimpleNamespace(), engine.ranks[0].manager.worker
        build = engine.leader.build_connector_meta
        engine.leader.build_connector_meta = lambda output: keep(sent, build(output))
        engine.submit(prompt(100))
        bind = worker.bind_connector_meta
        worker.bind_connector_meta = lambda meta: keep(sent, bind(meta), meta=meta)
        engine.run()
        assert pickle.dumps(sent.meta) == pickle.dumps(sent.made)
        assert sent.meta is not sent.made


def keep(where, value, **also):
    """Note a value in passing."""
    if also:
        vars(where).update(also)
    else:
        where.made = value
    return value


def test_an_engine_tells_when_it_is_idle_and_when_it_ends(profile):
    told = []
    plug = Plug("minimal", settle=lambda: told.append("idle"), close=lambda: told.append("end"))
    with Engine(profile, plug) as engine:
        engine.submit(prompt(10))
        engine.run()
        assert told == ["idle"]
    assert told == ["idle", "idle", "idle", "end"]


def test_a_preset_is_used_where_there_is_one(profile):
    plug = Plug("minimal", preset="lmcache-mp")
    config = plug.config(profile)
    module = "lmcache.integration.tensorrt_llm.tensorrt_mp_adapter"
    assert config.connector_module == (module if profile.presets else "minimal")


def test_a_mapping_is_of_the_rank_that_asks(profile):
    minimal = importlib.import_module("minimal")
    seen = {}

    class Worker(minimal.Worker):
        def __init__(self, llm_args):
            super().__init__(llm_args)
            mapping = llm_args.parallel_config.to_mapping()
            seen[self.rank] = (mapping.rank, mapping.tp_rank, mapping.tp_size)

    minimal.Worker = Worker
    with Engine(profile, Plug("minimal"), ranks=2):
        assert seen == {0: (0, 0, 2), 1: (1, 1, 2)}
