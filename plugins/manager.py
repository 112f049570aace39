"""Loads plugins and answers "which backend is this URL?".

A plugin that cannot be loaded, raises in a hook or claims a name that is taken stops the process
with its name and distribution: a cache that silently lacks a tier helps nobody.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import pluggy

import lmcache
from lmcache.core.environment import environment_flag
from lmcache.core.errors import ConfigError, LMCacheError, PluginError
from lmcache.core.redact import redact_value
from lmcache.plugins import NAME, hookspecs
from lmcache.plugins.hookspecs import (
    AdapterSpec,
    BackendSpec,
    CodecSpec,
    CommandSpec,
    EvictionSpec,
)
from lmcache.plugins.loading import (
    PluginInfo,
    blame,
    implemented_hooks,
    installed_plugins,
)
from lmcache.plugins.offers import Offers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from lmcache.core.backend import StorageBackend
    from lmcache.core.codec import Codec
    from lmcache.core.eviction import EvictionPolicy

BUILTINS = (
    "lmcache.plugins.builtins",
    "lmcache.backends.memory",
    "lmcache.backends.disk",
    "lmcache.backends.redis",
    "lmcache.backends.s3",
    "lmcache.backends.mooncake",
    "lmcache.backends.zlib_codec",
    "lmcache.backends.zstd_codec",
    "lmcache.backends.lz4_codec",
    "lmcache.backends.fp8_codec",
    "lmcache.adapters.sglang",
    "lmcache.adapters.trtllm",
    "lmcache.adapters.vllm",
    "lmcache.cli.commands",
)
"""Loaded before installed plugins; named, not imported, so that the layers hold."""


class PluginManager:
    """One process's plugins and what they offer. Build it once and hand it on."""

    def __init__(
        self,
        builtins: Iterable[str] = BUILTINS,
        *,
        entry_points: bool = True,
        env: Mapping[str, str] = os.environ,
    ) -> None:
        names = env.get("LMCACHE_DISABLED_PLUGINS", "").split(",")
        self._disabled = frozenset(name.strip() for name in names)
        self._traces = environment_flag("LMCACHE_TRACE_PLUGINS", env)
        self._pm = pluggy.PluginManager(NAME)
        self._pm.add_hookspecs(hookspecs)
        self._plugins: dict[str, PluginInfo] = {}
        self.backends = Offers("lmcache_backends", BackendSpec, "scheme", "storage backend")
        self.policies = Offers("lmcache_eviction_policies", EvictionSpec, "name", "eviction policy")
        self.codecs = Offers("lmcache_codecs", CodecSpec, "name", "codec")
        self.adapters = Offers("lmcache_adapters", AdapterSpec, "engine", "engine adapter")
        for path in builtins:
            info = PluginInfo(path, NAME, lmcache.__version__, builtin=True)
            self._load(info, partial(importlib.import_module, path))
        for entry_point, info in installed_plugins() if entry_points else ():
            self._load(info, entry_point.load)

    def plugins(self) -> tuple[PluginInfo, ...]:
        """Every loaded plugin in the order of loading: built-in ones first."""
        return tuple(self._plugins.values())

    def find_backend(self, url: str) -> BackendSpec:
        """The backend a URL names, or a `ConfigError` that lists the known ones."""
        scheme, separator, _ = url.partition("://")
        if not separator:
            raise ConfigError(f"{redact_value(url)!r} is not the URL of a storage backend")
        return self.backends.find(scheme)

    def open_backend(self, url: str) -> StorageBackend:
        """Open the backend a URL names."""
        spec = self.find_backend(url)
        owner = self.backends.owner(spec.scheme)
        with blame(owner, f"cannot open {redact_value(url)!r}", passing=(LMCacheError,)):
            return spec.open(url)

    def create_policy(self, name: str, capacity_bytes: int) -> EvictionPolicy:
        """A new eviction policy, by name in any case."""
        spec = self.policies.find(name)
        owner = self.policies.owner(name)
        with blame(owner, f"cannot create the eviction policy {name!r}", passing=(LMCacheError,)):
            return spec.create(capacity_bytes)

    def create_codec(self, name: str) -> Codec:
        """A new codec, by name in any case."""
        spec = self.codecs.find(name)
        owner = self.codecs.owner(name)
        with blame(owner, f"cannot create the codec {name!r}", passing=(LMCacheError,)):
            return spec.create()

    def engine_started(self, engine_id: str) -> None:
        """Tell every plugin that a cache engine is ready to serve."""
        for plugin in self.plugins():
            self._notify(plugin, "lmcache_engine_started", engine_id)

    def engine_stopped(self, engine_id: str) -> None:
        """Tell every plugin that it is about to go, last one first, even if one raises."""
        with ExitStack() as stack:
            for plugin in self.plugins():
                stack.callback(self._notify, plugin, "lmcache_engine_stopped", engine_id)

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin object by hand, as tests and notebooks do."""
        self._load(PluginInfo(name, "this process", "(by hand)"), lambda: plugin)

    @cached_property
    def commands(self) -> Offers[CommandSpec]:
        """The commands of the command line; plugins are asked for them when they are needed."""
        commands = Offers("lmcache_commands", CommandSpec, "name", "command")
        for plugin in self.plugins():
            self._collect(commands, plugin)
        return commands

    def _load(self, info: PluginInfo, load: Callable[[], object]) -> None:
        if info.name in self._disabled:
            return
        if info.name in self._plugins:
            raise PluginError(f"{self._plugins[info.name]} has the same name as {info}")
        with blame(info, f"cannot be loaded (LMCACHE_DISABLED_PLUGINS={info.name} skips it)"):
            plugin = load()
            self._pm.register(plugin, info.name)
        hooks = implemented_hooks(info, plugin, self._pm)
        info = self._plugins[info.name] = replace(info, hooks=hooks)
        for offers in (self.backends, self.policies, self.codecs, self.adapters):
            self._collect(offers, info)

    def _collect(self, offers: Offers[Any], plugin: PluginInfo) -> None:
        for implementation in self._implementations(plugin, offers.hook):
            with blame(plugin, f"failed in {offers.hook}"):
                specs = list(implementation())
            for spec in specs:
                offers.add(spec, plugin)

    def _notify(self, plugin: PluginInfo, hook: str, engine_id: str) -> None:
        for implementation in self._implementations(plugin, hook, engine_id=engine_id):
            with blame(plugin, f"failed in {hook}"):
                implementation()

    def _implementations(
        self, plugin: PluginInfo, hook: str, **arguments: object
    ) -> Iterator[Callable[[], Any]]:
        """One plugin's implementations of a hook, with the arguments that each of them takes."""
        caller: pluggy.HookCaller = getattr(self._pm.hook, hook)
        for impl in caller.get_hookimpls():
            if impl.plugin_name == plugin.name:
                if self._traces:
                    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
                    sys.stderr.write(f"lmcache: {hook}({given}) of {plugin}\n")
                yield partial(impl.function, *(arguments[name] for name in impl.argnames))
