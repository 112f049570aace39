"""The plugin system: markers here, extension points in `hookspecs`, loading in `manager`.

A plugin is a module (or object) with functions marked `hookimpl`, named by an entry point:

    [project.entry-points.lmcache]
    zip = "lmcache_zip"
"""

from __future__ import annotations

import pluggy

NAME = "lmcache"
"""Project name for pluggy, entry-point group, and prefix of every hook."""

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)

__all__ = ["NAME", "hookimpl", "hookspec"]
