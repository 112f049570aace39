"""How much memory this process may use: what the machine has, or what its cgroup allows."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
_USABLE = 0.8

_log = logging.getLogger("lmcache")


@dataclass(frozen=True)
class MemoryLimit:
    """The tightest limit on this process's memory."""

    bytes: int
    source: str
    """What sets it: `physical memory`, or the file of the cgroup."""


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """The smallest of physical memory and the limits of our cgroup and its parents, v1 and v2.

    `root` is where `proc` and `sys` are looked for. Without them physical memory is the limit.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [MemoryLimit(physical, "physical memory"), *_cgroup_limits(root)]
    return min(limits, key=lambda limit: limit.bytes)


def clamp_budget(requested_bytes: int, limit: MemoryLimit) -> int:
    """`requested_bytes`, but at most 80 % of the limit; says so once if it is less."""
    usable = int(limit.bytes * _USABLE)
    if requested_bytes <= usable:
        return requested_bytes
    _log.warning(
        "using %.2f GiB of memory instead of the %.2f GiB asked for: the limit is %.2f GiB (%s)",
        usable / GIB,
        requested_bytes / GIB,
        limit.bytes / GIB,
        limit.source,
    )
    return usable


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    for directory, name in _cgroup_directories(root):
        path = directory / name
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            yield MemoryLimit(int(text), str(path))


def _cgroup_directories(root: Path) -> Iterator[tuple[Path, str]]:
    """Every directory that may hold a limit on us, and the name of the file that holds it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # a path that is the host's does not exist in a container, where the mount is our cgroup
        cgroup = PurePosixPath("/") if ".." in path else PurePosixPath(path)
        for parent in (cgroup, *cgroup.parents):
            yield mount / parent.relative_to("/"), name
