"""The commands that come with the package. Each is imported when it is run."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, cast

from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import CommandSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import typer


def _load(module: str, attribute: str) -> typer.Typer | Callable[..., object]:
    return cast("typer.Typer | Callable[..., object]", getattr(import_module(module), attribute))


@hookimpl
def lmcache_commands() -> Iterable[CommandSpec]:
    for name, attribute, summary in (
        ("backends", "app", "Check a storage backend."),
        ("bench", "app", "Measure a server or a backend, and check every byte of it."),
        ("config", "app", "Show the effective configuration, and what may be configured."),
        ("describe", "describe", "Show what a server holds, or what an engine runs."),
        ("kvcache", "app", "Look into the memory of a server, or clear it."),
        ("ping", "ping", "Ask a server or an engine whether it lives."),
        ("plugins", "plugins", "List the plugins, and all that they offer."),
        ("server", "server", "Share one cache between engines."),
        ("version", "version", "Show the version."),
    ):
        yield CommandSpec(name, partial(_load, f"lmcache.cli.{name}", attribute), summary)
