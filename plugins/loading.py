"""Finding plugins, checking them, and saying which one is at fault."""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from lmcache.core.errors import PluginError
from lmcache.core.redact import redact_text
from lmcache.plugins import NAME, hookspecs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pluggy


@dataclass(frozen=True)
class PluginInfo:
    """A plugin and where it came from."""

    name: str
    """The name of its entry point; of a built-in plugin, its module."""
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()
    """The hooks it implements, once it is loaded."""
    builtin: bool = False

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}"


@contextmanager
def blame(
    plugin: PluginInfo, failure: str, *, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what a plugin raises into one line of `PluginError`; `passing` speaks for itself."""
    try:
        yield
    except passing:
        raise
    except Exception as exc:
        reason = " ".join(redact_text(str(exc)).split())
        raise PluginError(f"{plugin} {failure}: {type(exc).__name__}: {reason}") from exc


def installed_plugins() -> Iterator[tuple[metadata.EntryPoint, PluginInfo]]:
    """The entry points of our group by name, each once: a distribution may be found twice."""
    found: dict[tuple[str, str], tuple[metadata.EntryPoint, PluginInfo]] = {}
    for distribution in metadata.distributions():
        for entry_point in distribution.entry_points:
            if entry_point.group == NAME:
                about = distribution.metadata.json
                owner = str(about.get("name", "an unnamed distribution"))
                version = str(about.get("version", "of no version"))
                info = PluginInfo(entry_point.name, owner, version)
                found.setdefault((entry_point.name, owner), (entry_point, info))
    return (found[key] for key in sorted(found))


def implemented_hooks(
    info: PluginInfo, plugin: object, manager: pluggy.PluginManager
) -> tuple[str, ...]:
    """The hooks that a registered plugin implements; a mistake in them is a `PluginError`."""
    known = [name for name in vars(hookspecs) if name.startswith(f"{NAME}_")]
    for name in known:
        function = getattr(plugin, name, None)
        if callable(function) and not hasattr(function, f"{NAME}_impl"):
            raise PluginError(f"{info} has {name} without @lmcache.hookimpl")
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec():
            nearest = difflib.get_close_matches(caller.name, known, n=1, cutoff=0.0)[0]
            raise PluginError(
                f"{info} implements {caller.name}, which is no hook; the nearest is {nearest}"
            )
        for impl in caller.get_hookimpls():
            if impl.plugin is plugin and (impl.wrapper or impl.hookwrapper):
                raise PluginError(f"{info} wraps {caller.name}; hooks cannot be wrapped")
    return tuple(sorted(caller.name for caller in callers))
