from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcache.core.config import LoadedConfig, environment_flag, load_config
from lmcache.core.config_keys import Config, expected
from lmcache.core.environment import VARIABLES
from lmcache.core.errors import ConfigError
from lmcache.core.redact import redact_text, redact_value
from lmcache.core.upstream_names import IGNORED_KEYS, is_ignored_key

NAMES = st.text("abcdefghijklmnopqrstuvwxyz/-._0123456789", min_size=1).filter(
    lambda text: text.lower() not in ("none", "null")
)
COUNTS = st.integers(1, 10**6)
SIZES = st.floats(0.001, 10**6)
URLS = st.from_regex(r"[a-z][a-z0-9+]{0,5}://[a-z0-9:/?=]{1,20}", fullmatch=True)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "chunk_size": COUNTS,
    "local_cpu": st.booleans(),
    "max_local_cpu_size": SIZES,
    "local_disk": st.none() | NAMES,
    "max_local_disk_size": SIZES,
    "remote_url": st.none() | URLS,
    "l2": st.lists(URLS).map(tuple),
    "use_layerwise": st.booleans(),
    "save_decode_cache": st.booleans(),
    "save_unfull_chunk": st.booleans(),
    "cache_policy": NAMES,
    "lookup_timeout_ms": COUNTS,
    "fetch_timeout_ms": COUNTS,
    "pin_timeout_sec": COUNTS,
    "min_retrieve_tokens": COUNTS,
    "priority_limit": st.none() | st.integers(-100, 100),
    "model_id": st.none() | NAMES,
    "weight_generation": NAMES,
    "exchange": NAMES,
    "enable_kv_events": st.booleans(),
    "metrics_port": st.integers(0, 65535),
    "lmcache_instance_id": st.none() | NAMES,
}
PASSWORD = "hunter2"
COMPANIONS: dict[str, dict[str, Any]] = {
    "local_cpu": {"remote_url": "memory://"},
    "local_disk": {"max_local_disk_size": 1},
    "max_local_disk_size": {"local_disk": "/var/cache/kv"},
}


def variables(settings: dict[str, Any]) -> dict[str, str]:
    """The settings as environment variables."""
    return {f"LMCACHE_{key.upper()}": as_text(value) for key, value in settings.items()}


def as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def write(directory: Path, text: str) -> dict[str, str]:
    """An environment that names a file with that text."""
    path = directory / "lmcache.yaml"
    path.write_text(text)
    return {"LMCACHE_CONFIG_FILE": str(path)}


def refusal(extra: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(extra, env or {})
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, OSError)
    return str(caught.value)


def test_the_values_below_cover_every_key() -> None:
    assert VALUES.keys() == Config.model_fields.keys()


@pytest.mark.parametrize("key", Config.model_fields)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_key_means_the_same_in_the_file_the_environment_and_the_engine(
    key: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    value = data.draw(VALUES[key])
    wanted = {key: value, **({} if value is None else COMPANIONS.get(key, {}))}
    native = {k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items()}
    env = write(tmp_path_factory.getbasetemp(), yaml.safe_dump(native))
    loaded: dict[str, LoadedConfig] = {
        f"{env['LMCACHE_CONFIG_FILE']}:": load_config(env=env),
        f"environment variable LMCACHE_{key.upper()}": load_config(env=variables(wanted)),
        f"engine option lmcache.{key}": load_config(
            {f"lmcache.{k}": v for k, v in native.items()}, {}
        ),
    }
    for source, result in loaded.items():
        assert getattr(result.config, key) == value
        assert result.sources[key].startswith(source)
    first, *others = (result.config for result in loaded.values())
    assert all(other == first for other in others)


def test_defaults() -> None:
    loaded = load_config(env={})
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}
    assert loaded.config.tier_urls() == ()


def test_engine_over_environment_over_file_over_default(tmp_path: Path) -> None:
    env = write(tmp_path, "\nchunk_size: 1\npin_timeout_sec: 1\nmin_retrieve_tokens: 1\n")
    env |= {"LMCACHE_CHUNK_SIZE": "2", "LMCACHE_PIN_TIMEOUT_SEC": "2"}
    loaded = load_config({"lmcache.chunk_size": 3}, env)
    config = loaded.config
    assert (config.chunk_size, config.pin_timeout_sec, config.min_retrieve_tokens) == (3, 2, 1)
    assert loaded.sources["chunk_size"] == "engine option lmcache.chunk_size"
    assert loaded.sources["pin_timeout_sec"] == "environment variable LMCACHE_PIN_TIMEOUT_SEC"
    assert loaded.sources["min_retrieve_tokens"] == f"{tmp_path / 'lmcache.yaml'}:4"
    assert loaded.sources["local_cpu"] == "default"


def test_a_file_given_by_hand_replaces_that_of_the_environment(tmp_path: Path) -> None:
    env = write(tmp_path, "chunk_size: 1")
    (tmp_path / "other.yaml").write_text("chunk_size: 2")
    assert load_config(env=env, file=str(tmp_path / "other.yaml")).config.chunk_size == 2


def test_keys_without_our_prefix_belong_to_the_engine() -> None:
    extra = {"use_layerwise": True, "chunk_size": 1, "lmcache_rpc_port": 7}
    assert load_config(extra, {}).config == Config()


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", "on", " on "])
def test_ways_to_write_true(text: str) -> None:
    assert load_config(env={"LMCACHE_USE_LAYERWISE": text}).config.use_layerwise
    assert environment_flag("LMCACHE_X", {"LMCACHE_X": text})


@pytest.mark.parametrize("text", ["false", "False", "FALSE", "0", "no", "off"])
def test_ways_to_write_false(text: str) -> None:
    assert not load_config(env={"LMCACHE_SAVE_UNFULL_CHUNK": text}).config.save_unfull_chunk
    assert not environment_flag("LMCACHE_X", {"LMCACHE_X": text})


def test_a_flag_is_off_unless_it_is_set() -> None:
    assert not environment_flag("LMCACHE_X", {})
    with pytest.raises(ConfigError, match="LMCACHE_X is 'maybe', expected true or false"):
        environment_flag("LMCACHE_X", {"LMCACHE_X": "maybe"})


@pytest.mark.parametrize(
    ("extra", "env", "parts"),
    [
        ({"lmcache.chunk_sise": 1}, {}, ["'lmcache.chunk_sise'", "'lmcache.chunk_size'"]),
        ({}, {"LMCACHE_CHUNK_SISE": "1"}, ["'LMCACHE_CHUNK_SISE'", "'LMCACHE_CHUNK_SIZE'"]),
        ({}, {"LMCACHE_CONFIG": "x"}, ["'LMCACHE_CONFIG'", "'LMCACHE_CONFIG_FILE'"]),
        ({}, {"LMCACHE_chunk_size": "1"}, ["'LMCACHE_chunk_size'", "nearest"]),
        ({}, {"LMCACHE_METRICS": "1"}, ["'LMCACHE_METRICS'", "'LMCACHE_METRICS_PORT'"]),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_known_one(
    extra: dict[str, Any], env: dict[str, str], parts: list[str]
) -> None:
    message = refusal(extra, env)
    assert all(part in message for part in parts), message


def test_every_unknown_key_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    message = refusal(env=write(tmp_path, "chunk_sise: 1\nlocal_cpu: true\npd_backends: [x]\n"))
    for part in ("'chunk_sise'", "lmcache.yaml:1)", "'pd_backends'", "lmcache.yaml:3)"):
        assert part in message


def test_keys_of_upstream_are_ignored_with_one_warning(tmp_path: Path, warnings: list[str]) -> None:
    env = write(tmp_path, "enable_pd: true\nextra_config: {use_odirect: true, mine: 1}\nec: {}\n")
    env |= {"LMCACHE_REMOTE_SERDE": "cachegen", "LMCACHE_EC_CHUNK_SIZE": "1"}
    loaded = load_config({"lmcache.mp.host": "tcp://localhost"}, env)
    assert len(warnings) == 1
    for part in (
        "enable_pd (" + env["LMCACHE_CONFIG_FILE"] + ":1)",
        "remote_serde (environment variable LMCACHE_REMOTE_SERDE)",
        "ec_chunk_size (environment variable LMCACHE_EC_CHUNK_SIZE)",
        "mp.host (engine option lmcache.mp.host)",
        "extra_config (" + env["LMCACHE_CONFIG_FILE"] + ":2)",
    ):
        assert part in warnings[0]
        assert part in loaded.ignored


def test_nothing_to_ignore_nothing_to_warn_of(warnings: list[str]) -> None:
    load_config({"lmcache.chunk_size": 16}, {})
    assert warnings == []


def test_a_key_is_ours_or_ignored_not_both() -> None:
    assert not [key for key in Config.model_fields if is_ignored_key(key)]
    assert not IGNORED_KEYS & {name.removeprefix("LMCACHE_").lower() for name in VARIABLES}


@pytest.mark.parametrize(
    "name",
    [
        *VARIABLES,
        "LMCACHE_USE_EXPERIMENTAL",
        "LMCACHE_TRACK_USAGE",
        "LMCACHE_USE_UPSTREAM_MP",
        "LMCACHE_COORDINATOR_URL",
        "LMCACHE_RESP_HOST",
        "LMCACHE_TEST_ANYTHING",
    ],
)
def test_other_known_variables_are_accepted(name: str, warnings: list[str]) -> None:
    env = {name: {"LMCACHE_CONFIG_FILE": "", "LMCACHE_COPY_PATH": "staged"}.get(name, "value")}
    assert load_config(env=env).config == Config()
    assert warnings == []


def test_a_path_for_copies_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="LMCACHE_COPY_PATH is 'fast', expected one of direct"):
        load_config(env={"LMCACHE_COPY_PATH": "fast"})


def test_what_kubernetes_adds_for_a_service_is_left_alone(warnings: list[str]) -> None:
    env = {
        "LMCACHE_METRICS_SERVICE_HOST": "10.0.0.1",
        "LMCACHE_METRICS_SERVICE_PORT": "9090",
        "LMCACHE_METRICS_SERVICE_PORT_HTTP": "9090",
        "LMCACHE_METRICS_PORT": "tcp://10.0.0.1:9090",
        "LMCACHE_METRICS_PORT_9090_TCP": "tcp://10.0.0.1:9090",
        "LMCACHE_METRICS_PORT_9090_TCP_ADDR": "10.0.0.1",
    }
    assert load_config(env=env).config.metrics_port == 0
    assert load_config(env=env | {"LMCACHE_METRICS_PORT": "9"}).config.metrics_port == 9
    assert warnings == []
    assert "metrics_port is" in refusal(env={"LMCACHE_METRICS_PORT": "tcp://10.0.0.1:9090"})


WRONG: dict[str, list[Any]] = {
    "chunk_size": [0, -1, True, "many", 1.5, None, ""],
    "local_cpu": ["maybe", 2, None],
    "max_local_cpu_size": [0, -1.0, True, "5 GB", float("nan"), float("inf")],
    "local_disk": ["/a,/b", "s3://bucket", "file:///x?max_size=1GB", ["/a"]],
    "max_local_disk_size": [-1, "all"],
    "remote_url": ["localhost:6379", 7],
    "l2": ["localhost", ["file:///x", "y"], [1]],
    "cache_policy": [""],
    "metrics_port": [65536, -1, "http"],
    "priority_limit": [True, "low"],
    "weight_generation": [None, [1]],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_a_wrong_value_is_named_with_its_source_and_what_is_expected(key: str, value: Any) -> None:
    message = refusal({f"lmcache.{key}": value})
    assert message == (
        f"{key} is {value!r} (engine option lmcache.{key}), expected {expected(key)}"
    )


def test_a_memory_tier_that_is_off_needs_another_tier() -> None:
    message = refusal(env={"LMCACHE_LOCAL_CPU": "false"})
    assert message.startswith("nothing would be cached")
    assert "environment variable LMCACHE_LOCAL_CPU" in message
    for tier in ({"remote_url": "memory://"}, {"l2": ("memory://",)}):
        load_config(env=variables({"local_cpu": False, **tier}))


def test_a_disk_tier_needs_a_place_and_a_size() -> None:
    assert "set max_local_disk_size" in refusal({"lmcache.local_disk": "/x"})
    assert "set local_disk" in refusal({"lmcache.max_local_disk_size": 1})
    with pytest.raises(ValidationError, match="set max_local_disk_size"):
        Config(local_disk="/x")


@pytest.mark.parametrize(
    ("directory", "url"),
    [
        ("/var/cache/kv", "file:///var/cache/kv?max_size=1610612736"),
        ("file:///var/cache/kv", "file:///var/cache/kv?max_size=1610612736"),
        ("file:///a%20b/?codec=zlib", "file:///a%20b?codec=zlib&max_size=1610612736"),
        ("/a b?c", "file:///a%20b%3Fc?max_size=1610612736"),
        ("here", f"file://{Path.cwd()}/here?max_size=1610612736"),
        ("~/here", f"file://{Path.home()}/here?max_size=1610612736"),
    ],
)
def test_tiers_are_asked_disk_first_and_remote_last(directory: str, url: str) -> None:
    config = Config(
        local_disk=directory,
        max_local_disk_size=1.5,
        l2=("redis://one", "s3://two"),
        remote_url="redis://three",
    )
    assert config.tier_urls() == (url, "redis://one", "s3://two", "redis://three")


def test_a_comma_inside_a_url_does_not_split_it() -> None:
    env = {"LMCACHE_L2": "redis://one:1,two:2, file:///x,"}
    assert load_config(env=env).config.l2 == ("redis://one:1,two:2", "file:///x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a mapping"),
        ("just text", "is not a mapping"),
        ("a: [1", ":1 is not YAML"),
        ("chunk_size: 1\nchunk_size: 2", r"chunk_size is set twice: .*:1 and .*:2"),
        ("chunk_size: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("chunk_size: 2026-99-99", "cannot be read"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(env=write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.yaml")
    assert path in refusal(env={"LMCACHE_CONFIG_FILE": path})


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load_config(env=write(tmp_path, "# nothing\n")).config == Config()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:pa:ss@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:pa/ss@host", "redis://***@host"),
        ("redis://:pa ss@host", "redis://***@host"),
        ("redis://token@host", "redis://***@host"),
        (
            "s3://b/x?region=eu&secret_access_key=abc&x=1",
            "s3://b/x?region=eu&secret_access_key=***&x=1",
        ),
        ("s3://bucket/path@v2", "s3://bucket/path@v2"),
        ("org/model@main", "org/model@main"),
        ("10.0.0.1:6379", "10.0.0.1:6379"),
    ],
)
def test_what_is_secret_in_a_url(text: str, shown: str) -> None:
    assert redact_value(text) == shown
    assert redact_value({"l2": [text]}) == {"l2": [shown]}
    if " " not in text:
        assert redact_text(f"cannot open {text!r} now") == f"cannot open {shown!r} now"


def test_secrets_are_in_no_message_listing_or_repr() -> None:
    extra = {
        "lmcache.remote_url": f"redis://user:{PASSWORD}@host",
        "lmcache.l2": [f"redis://:{PASSWORD}@host", f"s3://b?secret_key={PASSWORD}"],
    }
    loaded = load_config(extra, {})
    assert PASSWORD in "".join(loaded.config.tier_urls())
    for shown in (repr(loaded), str(loaded.config), repr(loaded.settings())):
        assert PASSWORD not in shown
        assert "***" in shown
    for key, value in {
        "remote_url": f"user:{PASSWORD}@host",
        "l2": [f"redis://user:{PASSWORD}@host", 1],
        "chunk_size": f"redis://user:{PASSWORD}@host",
        "local_disk": f"redis://user:{PASSWORD}@host",
    }.items():
        assert PASSWORD not in refusal({f"lmcache.{key}": value})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().chunk_size = 1


def test_nobody_else_reads_the_environment() -> None:
    root = Path(__file__).parents[2]
    readers = {"core/config.py", "core/environment.py", "core/log.py", "plugins/manager.py"}
    readers.add("backends/mooncake_child.py")  # it sets what its library reads
    for folder in ("core", "plugins", "backends", "adapters"):
        for path in (root / folder).rglob("*.py"):
            reads = "environ" in path.read_text().replace("environment", "")
            assert not reads or str(path.relative_to(root)) in readers, path
