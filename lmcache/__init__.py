"""LMCache: keeps KV caches outside the engine that computed them.

What a plugin needs is here, and nothing is imported until it is used:

    import lmcache

    @lmcache.hookimpl
    def lmcache_backends():
        yield lmcache.BackendSpec("zip", open_zip, "a zip file")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache.core.backend import Capabilities, StorageBackend
    from lmcache.core.codec import Codec
    from lmcache.core.errors import (
        BackendClosed,
        BackendError,
        ConfigError,
        LMCacheError,
        PluginError,
        Unsupported,
    )
    from lmcache.core.eviction import EvictionPolicy
    from lmcache.core.keys import ChunkKey
    from lmcache.plugins import hookimpl
    from lmcache.plugins.hookspecs import (
        AdapterSpec,
        BackendSpec,
        CodecSpec,
        CommandSpec,
        EvictionSpec,
    )

    __version__: str

_HOMES = {
    "lmcache.core.backend": ("Capabilities", "StorageBackend"),
    "lmcache.core.codec": ("Codec",),
    "lmcache.core.errors": (
        "BackendClosed",
        "BackendError",
        "ConfigError",
        "LMCacheError",
        "PluginError",
        "Unsupported",
    ),
    "lmcache.core.eviction": ("EvictionPolicy",),
    "lmcache.core.keys": ("ChunkKey",),
    "lmcache.plugins": ("hookimpl",),
    "lmcache.plugins.hookspecs": (
        "AdapterSpec",
        "BackendSpec",
        "CodecSpec",
        "CommandSpec",
        "EvictionSpec",
    ),
}

__all__ = [
    "AdapterSpec",
    "BackendClosed",
    "BackendError",
    "BackendSpec",
    "Capabilities",
    "ChunkKey",
    "Codec",
    "CodecSpec",
    "CommandSpec",
    "ConfigError",
    "EvictionPolicy",
    "EvictionSpec",
    "LMCacheError",
    "PluginError",
    "StorageBackend",
    "Unsupported",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("lmcache")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return __all__
