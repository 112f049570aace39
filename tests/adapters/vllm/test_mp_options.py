"""The `lmcache.mp.*` keys, and the names that vLLM's own MP module imports."""

from __future__ import annotations

import importlib

import pytest

from lmcache.adapters.vllm.mp_options import REFUSED, split_options
from lmcache.core.errors import ConfigError

# what engines import at that moment is theirs to mend
theirs = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def options(**keys):
    return split_options({f"lmcache.mp.{key}": value for key, value in keys.items()})[0]


def test_the_defaults():
    made = options()
    assert made.endpoint == "tcp://127.0.0.1:5555"
    assert (made.mp_transfer_mode, made.mq_timeout, made.autostart) == ("auto", 1.0, False)


@pytest.mark.parametrize(
    ("keys", "endpoint"),
    [
        ({"host": "tcp://localhost"}, "tcp://localhost:5555"),
        ({"host": "localhost", "port": 7}, "tcp://localhost:7"),
        ({"host": "10.0.0.1", "port": "5556"}, "tcp://10.0.0.1:5556"),
        ({"server_urls": "tcp://a:1"}, "tcp://a:1"),
        ({"server_urls": ["a:1"]}, "tcp://a:1"),
        ({"server_urls": "", "port": 9}, "tcp://127.0.0.1:9"),
    ],
)
def test_where_the_server_is(keys, endpoint):
    assert options(**keys).endpoint == endpoint


def test_other_keys_are_left_alone():
    extra = {"lmcache.mp.port": 1, "lmcache.chunk_size": 64, "use_layerwise": True}
    made, rest = split_options(extra)
    assert made.port == 1
    assert rest == {"lmcache.chunk_size": 64, "use_layerwise": True}


def test_keys_with_a_dot():
    made = options(
        **{"autostart": "true", "autostart.wait_timeout": 5, "autostart.server_args": "-x"}
    )
    assert (made.autostart, made.autostart_wait_timeout) == (True, 5.0)
    assert made.autostart_server_args == "-x"


def test_the_environment_says_the_mode(monkeypatch):
    monkeypatch.setenv("LMCACHE_MP_TRANSFER_MODE", "lmcache_driven")
    assert options().mp_transfer_mode == "lmcache_driven"
    assert options(mp_transfer_mode="engine_driven").mp_transfer_mode == "engine_driven"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(name):
    options(**{name: False})
    with pytest.raises(ConfigError, match=f"lmcache.mp.{name} cannot be had: "):
        options(**{name: True})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"hostt": "x"},
            "unknown configuration key 'lmcache.mp.hostt', the nearest is 'lmcache.mp.host'",
        ),
        ({"port": "many"}, "lmcache.mp.port is 'many'"),
        ({"port": 70000}, "lmcache.mp.port is 70000"),
        ({"mq_timeout": 0}, "lmcache.mp.mq_timeout is 0"),
        ({"mp_transfer_mode": "both"}, "lmcache.mp.mp_transfer_mode is 'both', expected auto"),
        ({"hash_algorithm": "sha256"}, "lmcache.mp.hash_algorithm is 'sha256', keys are blake3"),
        ({"server_urls": "tcp://a:1,tcp://b:2"}, "names 2 servers; one can be used"),
        ({"save_decode_cache": "perhaps"}, "lmcache.mp.save_decode_cache is 'perhaps'"),
    ],
)
def test_what_cannot_be_used(keys, message):
    with pytest.raises(ConfigError) as error:
        options(**keys)
    assert message in str(error.value)


@theirs
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lmcache.integration.vllm.lmcache_mp_connector", "LMCacheMPConnector"),
        ("lmcache.integration.vllm.utils", "mla_enabled"),
        ("lmcache.utils", "init_logger"),
        ("lmcache.integration.vllm.vllm_multi_process_adapter", "LMCacheMPSchedulerAdapter"),
        ("lmcache.integration.vllm.vllm_multi_process_adapter", "LMCacheMPWorkerAdapter"),
        ("lmcache.integration.vllm.vllm_multi_process_adapter", "LoadStoreOp"),
        ("lmcache.integration.vllm.vllm_multi_process_adapter", "ParallelStrategy"),
        ("lmcache.v1.multiprocess.custom_types", "BlockAllocationRecord"),
    ],
)
def test_names_that_vllm_imports(rig, module, name):
    assert hasattr(importlib.import_module(module), name)


@theirs
def test_vllm_finds_our_class_by_name(rig):
    module = importlib.import_module(
        "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector"
    )
    assert module.LMCacheMPConnector.__module__ == "lmcache.adapters.vllm.mp_connector"


def test_what_only_vllms_own_connector_would_use_says_so():
    from lmcache.integration.vllm.vllm_multi_process_adapter import LMCacheMPSchedulerAdapter

    with pytest.raises(ConfigError, match="unset LMCACHE_USE_UPSTREAM_MP"):
        LMCacheMPSchedulerAdapter("tcp://localhost:5555", None, "model", 1, 0, 16)
