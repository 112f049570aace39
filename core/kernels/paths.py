"""Which way bytes take between a GPU and the host: measured on the machine, for runs of any length.

* `direct`: the copy engine copies each run; no multiprocessor is needed, but every run costs it
  half a microsecond
* `staged`: a kernel gathers runs in a buffer of the device, the copy engine copies that; or the
  other way round
* `kernel`: a kernel reads or writes the host's memory itself, over the bus
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from lmcache.core.environment import environment_text
from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

DIRECT, STAGED, KERNEL = PATHS = ("direct", "staged", "kernel")

Table = dict[str, dict[int, str]]
"""For `store` and `load`: from which length of runs on which path is the fastest."""


class Paths:
    """The fastest path for each length of runs, or one for all."""

    def __init__(self, table: Mapping[str, Mapping[int, str]], forced: str = "") -> None:
        """`table` has an entry for stores and one for loads, each with at least one length."""
        self.forced = forced
        """The path that is taken whatever the table says, if any."""
        self._from = {name: sorted(row) for name, row in table.items()}
        self._path = {name: [row[n] for n in sorted(row)] for name, row in table.items()}

    def choose(self, run_bytes: float, *, to_slab: bool) -> str:
        """One of `PATHS`."""
        if self.forced:
            return self.forced
        name = "store" if to_slab else "load"
        return self._path[name][max(0, bisect_right(self._from[name], run_bytes) - 1)]


def forced_path(env: Mapping[str, str] | None = None) -> str:
    """What `LMCACHE_COPY_PATH` says, if anything. Raises `ConfigError` if that is no path."""
    name = "LMCACHE_COPY_PATH"
    path = environment_text(name) if env is None else environment_text(name, env=env)
    if path not in ("", *PATHS):
        raise ConfigError(f"{name} is {path!r}, expected one of {', '.join(PATHS)}")
    return path
