from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import lmcache
from lmcache.core.errors import BackendError, ConfigError, PluginError
from lmcache.plugins import hookspecs
from lmcache.plugins.manager import BUILTINS, PluginManager
from lmcache.testing import BackendSuite

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
DOCS = (ROOT / "docs/plugins.md").read_text()
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "lmcache_spec")]


def manager(env: dict[str, str] | None = None, builtins: Iterable[str] = ()) -> PluginManager:
    """A manager without installed plugins."""
    return PluginManager(builtins, entry_points=False, env=env or {})


def plugin(**hooks: Callable[..., Any]) -> object:
    """An object that implements the named hooks."""
    return type("Plugin", (), {n: staticmethod(lmcache.hookimpl(f)) for n, f in hooks.items()})()


def install(site: Path, name: str, source: str, *, version: str = "1.2") -> None:
    """A distribution `lmcache-NAME` with a plugin NAME, as pip would leave it."""
    (site / f"lmcache_{name}.py").write_text(source)
    info = site / f"lmcache_{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: lmcache-{name}\nVersion: {version}\n"
    )
    (info / "entry_points.txt").write_text(f"[lmcache]\n{name} = lmcache_{name}\n")


def backend(scheme: str, opener: Callable[[str], Any] = str) -> lmcache.BackendSpec:
    return lmcache.BackendSpec(scheme, opener, "for tests")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


# what comes with the package


def test_the_package_itself_is_plugins() -> None:
    plugins = manager(builtins=BUILTINS)
    assert [p.name for p in plugins.plugins()] == list(BUILTINS)
    assert all(p.builtin and p.distribution == "lmcache" and p.hooks for p in plugins.plugins())
    assert {"file", "memory"} <= set(plugins.backends)
    assert set(plugins.policies) == {"ARC", "LRU", "S3FIFO"}
    assert set(plugins.codecs) == {"fp8", "lz4", "zlib", "zstd"}
    assert "vllm" in plugins.adapters
    assert {"backends", "config", "plugins", "version"} <= set(plugins.commands)


@pytest.mark.parametrize("name", ["LRU", "lru", "S3FIFO", "s3fifo", "Arc"])
def test_policies_are_created_by_name_in_any_case(name: str) -> None:
    plugins = manager(builtins=["lmcache.plugins.builtins"])
    policy = plugins.create_policy(name, 1 << 30)
    assert isinstance(policy, lmcache.EvictionPolicy)
    assert type(policy).__name__.lower().startswith(name.lower())


def test_codecs_and_backends_are_created_by_name() -> None:
    plugins = manager(builtins=["lmcache.backends.memory", "lmcache.backends.zlib_codec"])
    assert plugins.create_codec("ZLIB").name == "zlib"
    with plugins.open_backend("MEMORY://") as opened:
        assert isinstance(opened, lmcache.StorageBackend)


def test_what_is_unknown_lists_what_is_known() -> None:
    plugins = manager(builtins=BUILTINS)
    known = "file, memory, mooncake, redis"
    with pytest.raises(ConfigError, match=f"no storage backend 'shelf'; known: {known}"):
        plugins.open_backend("shelf://user:hunter2@x")
    with pytest.raises(ConfigError, match="no eviction policy 'FIFO'; known: ARC, LRU, S3FIFO"):
        plugins.create_policy("FIFO", 1)
    with pytest.raises(ConfigError, match="no codec 'zst'; known: fp8, lz4, zlib, zstd"):
        plugins.create_codec("zst")
    with pytest.raises(ConfigError, match="'nonsense' is not the URL of a storage backend"):
        plugins.open_backend("nonsense")
    with pytest.raises(ConfigError, match="known: none"):
        manager().create_codec("zlib")


# installed plugins


def test_an_installed_plugin_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SITE)
    plugins = PluginManager(builtins=(), env={})
    (info,) = [p for p in plugins.plugins() if p.name == "dict"]
    assert (info.distribution, info.version, info.builtin) == ("lmcache-dict", "0.1", False)
    assert info.hooks == ("lmcache_backends",)
    assert plugins.backends.owner("dict") == info
    assert "dict" in plugins.backends


class TestTheTutorialsBackend(BackendSuite):
    @pytest.fixture
    def open_backend(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], lmcache.StorageBackend]:
        monkeypatch.syspath_prepend(SITE)
        plugins = PluginManager(builtins=(), env={})
        return lambda: plugins.open_backend("dict://")


def test_a_plugin_found_twice_is_loaded_once(
    site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path_factory.mktemp("again")
    for directory in (site, again):
        install(directory, "twice", "")
    monkeypatch.syspath_prepend(again)
    plugins = PluginManager(builtins=(), env={})
    assert [p.name for p in plugins.plugins()].count("twice") == 1


def test_two_distributions_may_not_share_a_plugin_name(site: Path) -> None:
    install(site, "one", "")
    install(site, "two", "")
    for info in site.glob("*.dist-info"):
        (info / "entry_points.txt").write_text("[lmcache]\nsame = lmcache_one\n")
    with pytest.raises(PluginError, match=r"lmcache-one 1\.2 has the same name as .*lmcache-two"):
        PluginManager(builtins=(), env={})


@pytest.mark.parametrize("disabled", ["dict", "x, dict ,y"])
def test_a_disabled_plugin_is_not_loaded(monkeypatch: pytest.MonkeyPatch, disabled: str) -> None:
    monkeypatch.syspath_prepend(SITE)
    plugins = PluginManager(builtins=(), env={"LMCACHE_DISABLED_PLUGINS": disabled})
    assert "dict" not in plugins.backends
    assert "dict" not in [p.name for p in plugins.plugins()]


def test_a_disabled_plugin_is_not_even_imported(site: Path) -> None:
    install(site, "broken", "import no_such_module")
    PluginManager(builtins=(), env={"LMCACHE_DISABLED_PLUGINS": "broken"})


def test_built_in_plugins_can_be_disabled() -> None:
    plugins = manager({"LMCACHE_DISABLED_PLUGINS": "lmcache.backends.memory"}, BUILTINS)
    assert "memory" not in plugins.backends


# plugins at fault


def test_a_plugin_that_cannot_be_imported(site: Path) -> None:
    install(site, "broken", "import no_such_module")
    with pytest.raises(PluginError) as caught:
        PluginManager(builtins=(), env={})
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    message = str(caught.value)
    assert "plugin 'broken' of lmcache-broken 1.2" in message
    assert "no_such_module" in message
    assert "LMCACHE_DISABLED_PLUGINS=broken" in message


def test_a_built_in_plugin_that_does_not_exist() -> None:
    with pytest.raises(PluginError, match=r"'lmcache\.nowhere' of lmcache \d"):
        manager(builtins=["lmcache.nowhere"])


def raising(*_args: Any) -> Any:
    raise ValueError("two\nlines about redis://user:hunter2@host")


def half() -> Any:
    yield backend("one")
    raise ValueError("after the first")


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(raising, id="raises"),
        pytest.param(half, id="raises-late"),
        pytest.param(lambda: None, id="returns-none"),
        pytest.param(lambda: (_ for _ in ()).throw(ConfigError("ours")), id="raises-ours"),
    ],
)
def test_a_hook_that_raises(hook: Callable[[], Any]) -> None:
    with pytest.raises(
        PluginError, match=r"^plugin 'bad' of .* failed in lmcache_backends: .+$"
    ) as e:
        manager().register(plugin(lmcache_backends=hook), "bad")
    assert e.value.__cause__ is not None
    assert "hunter2" not in str(e.value)


def test_a_hook_that_offers_something_else() -> None:
    with pytest.raises(PluginError, match=r"'bad' .* offers 'zip' in .*, expected BackendSpec"):
        manager().register(plugin(lmcache_backends=lambda: ["zip"]), "bad")


def test_a_misspelt_hook() -> None:
    with pytest.raises(PluginError, match=r"'typo' .* lmcache_backend, .* is lmcache_backends"):
        manager().register(plugin(lmcache_backend=raising), "typo")


def test_a_hook_with_an_argument_that_it_does_not_have() -> None:
    with pytest.raises(PluginError, match=r"'bad' .*lmcache_engine_started.*\bengine\b"):
        manager().register(plugin(lmcache_engine_started=lambda engine: engine), "bad")


def test_a_hook_without_the_mark() -> None:
    class Unmarked:
        def lmcache_backends(self) -> list[Any]:
            return []

    with pytest.raises(PluginError, match=r"'bad' .* lmcache_backends without @lmcache\.hookimpl"):
        manager().register(Unmarked(), "bad")


def test_a_hook_that_wraps_others() -> None:
    class Wrapper:
        @lmcache.hookimpl(wrapper=True)
        def lmcache_backends(self) -> Any:
            return (yield)

    with pytest.raises(PluginError, match=r"'bad' .* wraps lmcache_backends"):
        manager().register(Wrapper(), "bad")


def test_two_claims_on_a_scheme_name_both_plugins() -> None:
    plugins = manager(builtins=["lmcache.backends.memory"])
    with pytest.raises(PluginError) as caught:
        plugins.register(plugin(lmcache_backends=lambda: [backend("Memory")]), "impostor")
    message = str(caught.value)
    assert "storage backend 'Memory'" in message
    assert f"plugin 'lmcache.backends.memory' of lmcache {lmcache.__version__}" in message
    assert "plugin 'impostor' of this process" in message


SPECS: dict[str, Any] = {
    "lmcache_backends": backend("same"),
    "lmcache_eviction_policies": lmcache.EvictionSpec("same", raising, ""),
    "lmcache_codecs": lmcache.CodecSpec("same", raising, ""),
    "lmcache_adapters": lmcache.AdapterSpec("same", "module:name", ">=1", ""),
    "lmcache_commands": lmcache.CommandSpec("same", raising, ""),
}


@pytest.mark.parametrize("hook", SPECS)
def test_every_kind_of_name_may_be_claimed_once(hook: str) -> None:
    plugins = manager()

    def claim(name: str) -> None:
        plugins.register(plugin(**{hook: lambda: [SPECS[hook]]}), name)
        if name == "second":
            # commands are asked for when they are needed
            assert plugins.commands

    claim("first")
    with pytest.raises(PluginError, match=r"'same' is offered twice, by .*'first'.* by .*'second'"):
        claim("second")


def test_what_a_description_raises_is_blamed_on_its_plugin() -> None:
    plugins = manager()
    plugins.register(
        plugin(
            lmcache_backends=lambda: [backend("bad", raising)],
            lmcache_eviction_policies=lambda: [SPECS["lmcache_eviction_policies"]],
            lmcache_codecs=lambda: [SPECS["lmcache_codecs"]],
        ),
        "bad",
    )
    for call in (
        lambda: plugins.open_backend("bad://user:hunter2@host"),
        lambda: plugins.create_policy("same", 1),
        lambda: plugins.create_codec("same"),
    ):
        with pytest.raises(
            PluginError, match=r"^plugin 'bad' .* cannot .*: ValueError: "
        ) as caught:
            call()
        assert "hunter2" not in str(caught.value)


def test_an_error_of_ours_from_a_backend_speaks_for_itself() -> None:
    def opener(_url: str) -> Any:
        raise BackendError("no route")

    plugins = manager()
    plugins.register(plugin(lmcache_backends=lambda: [backend("far", opener)]), "far")
    with pytest.raises(BackendError, match=r"^no route$"):
        plugins.open_backend("far://")


# notifications and tracing


def test_engines_are_announced_to_every_plugin() -> None:
    heard: list[tuple[str, ...]] = []
    plugins = manager()
    listener = plugin(
        lmcache_engine_started=lambda engine_id: heard.append(("started", engine_id)),
        lmcache_engine_stopped=lambda: heard.append(("stopped",)),
    )
    plugins.register(listener, "listener")
    plugins.engine_started("e1")
    plugins.engine_stopped("e1")
    assert heard == [("started", "e1"), ("stopped",)]


def test_one_that_raises_stops_the_start_but_not_the_others_end() -> None:
    heard: list[str] = []

    def heard_of(engine_id: str) -> None:
        heard.append(engine_id)

    plugins = manager()
    bad = plugin(lmcache_engine_started=raising, lmcache_engine_stopped=raising)
    plugins.register(bad, "bad")
    plugins.register(plugin(lmcache_engine_stopped=heard_of), "good")
    with pytest.raises(PluginError, match=r"'bad' .* failed in lmcache_engine_started"):
        plugins.engine_started("e1")
    with pytest.raises(PluginError, match=r"'bad' .* failed in lmcache_engine_stopped"):
        plugins.engine_stopped("e1")
    assert heard == ["e1"]


def test_offers_are_asked_for_once_and_commands_when_they_are_needed() -> None:
    asked: list[str] = []
    plugins = manager()

    def offering(hook: str) -> Callable[[], list[Any]]:
        def offer() -> list[Any]:
            asked.append(hook)
            return [SPECS[hook]]

        return offer

    plugins.register(plugin(**{hook: offering(hook) for hook in SPECS}), "all")
    assert sorted(asked) == sorted(SPECS.keys() - {"lmcache_commands"})
    assert plugins.commands is plugins.commands
    assert "same" in plugins.backends
    assert sorted(asked) == sorted(SPECS)


def test_calls_can_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    plugins = manager({"LMCACHE_TRACE_PLUGINS": "1"}, ["lmcache.backends.memory"])
    plugins.register(plugin(lmcache_engine_started=lambda engine_id: engine_id), "listener")
    plugins.engine_started("e1")
    trace = capsys.readouterr().err
    assert "lmcache_backends() of plugin 'lmcache.backends.memory' of lmcache" in trace
    assert "lmcache_engine_started(engine_id='e1') of plugin 'listener'" in trace


def test_nothing_is_traced_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    manager(builtins=BUILTINS)
    assert capsys.readouterr().err == ""


# documentation


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_signature(hook: str) -> None:
    signature = inspect.signature(getattr(hookspecs, hook))
    arguments = ", ".join(f"{p.name}: {p.annotation}" for p in signature.parameters.values())
    assert f"\n### `{hook}({arguments}) -> {signature.return_annotation}`\n" in DOCS


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_tested(hook: str) -> None:
    assert hook in SPECS or f"{hook}=" in Path(__file__).read_text()


def test_the_tutorial_is_the_plugin_that_is_tested() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert ast.dump(ast.parse(block)) == ast.dump(ast.parse((SITE / "lmcache_dict.py").read_text()))
