"""Every extension point, in the order a process meets them.

Hooks run while a process is being put together, never per request: a hook returns a description,
and the object built from it is called directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.plugins import hookspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import typer

    from lmcache.core.backend import StorageBackend
    from lmcache.core.codec import Codec
    from lmcache.core.eviction import EvictionPolicy


@dataclass(frozen=True)
class BackendSpec:
    """A storage backend on offer."""

    scheme: str
    """The URL scheme that selects it, e.g. `redis`."""
    open: Callable[[str], StorageBackend]
    """Opens the backend at a URL. Import heavy dependencies inside it."""
    summary: str
    """One line for `lmcache plugins`."""


@dataclass(frozen=True)
class EvictionSpec:
    """An eviction policy on offer."""

    name: str
    """What users write in `cache_policy`; compared without regard to case."""
    create: Callable[[int], EvictionPolicy]
    """Builds a policy, given the capacity of the slab in bytes."""
    summary: str


@dataclass(frozen=True)
class CodecSpec:
    """A codec on offer."""

    name: str
    """What users write in `?codec=` of a tier's URL."""
    create: Callable[[], Codec]
    summary: str


@dataclass(frozen=True)
class AdapterSpec:
    """An engine we can serve."""

    engine: str
    """The engine's distribution name, e.g. `vllm`."""
    entry: str
    """`module:attribute` of the object the engine loads."""
    versions: str
    """The engine versions it is made for, e.g. `>=0.22,<0.34`."""
    summary: str


@dataclass(frozen=True)
class CommandSpec:
    """A CLI command on offer."""

    name: str
    load: Callable[[], typer.Typer | Callable[..., object]]
    """Returns the command, or a group of commands. Import heavy dependencies inside it."""
    summary: str


@hookspec
def lmcache_backends() -> Iterable[BackendSpec]:
    """Offer storage backends.

    Called once, when the plugin manager is built. Two plugins offering one scheme is an error that
    names both.
    """
    return ()


@hookspec
def lmcache_eviction_policies() -> Iterable[EvictionSpec]:
    """Offer eviction policies.

    Called once, when the plugin manager is built. Two plugins offering one name is an error.
    """
    return ()


@hookspec
def lmcache_codecs() -> Iterable[CodecSpec]:
    """Offer codecs for storage tiers.

    Called once, when the plugin manager is built. Two plugins offering one name is an error.
    """
    return ()


@hookspec
def lmcache_adapters() -> Iterable[AdapterSpec]:
    """Offer engine adapters.

    Called once, when the plugin manager is built. Two plugins offering one engine is an error.
    """
    return ()


@hookspec
def lmcache_commands() -> Iterable[CommandSpec]:
    """Offer commands of the `lmcache` command line.

    Called once per invocation of the command line. Two plugins offering one name is an error.
    """
    return ()


@hookspec
def lmcache_engine_started(engine_id: str) -> None:
    """Take note that a cache engine is ready to serve.

    Called once per engine, in the process that decides, after every storage backend is open. An
    exception stops the start-up.
    """


@hookspec
def lmcache_engine_stopped(engine_id: str) -> None:
    """Take note that a cache engine is about to go; its backends are still open.

    Called once per engine that was started, unless the process is killed.
    """
