"""A process that puts objects and waits to be killed; see `processes`.

It reads one line of JSON and says on its standard output what it does.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

from lmcache.core.assembly import open_tier
from lmcache.core.keys import ChunkKey
from lmcache.plugins.manager import PluginManager


def content(key: ChunkKey, size: int) -> memoryview:
    """The object that this puts under `key`: no two parts of it are alike."""
    return memoryview(hashlib.shake_128(key).digest(size))


def main() -> None:
    """Put what is asked for, and neither close nor end."""
    asked = json.loads(sys.stdin.readline())
    backend = open_tier(asked["url"], PluginManager()).backend
    for name in asked["keys"]:
        key = ChunkKey(bytes.fromhex(name))
        data = content(key, asked["size"])
        _say("putting")
        began = time.perf_counter()
        stored = backend.put(key, data)
        _say(f"{'stored' if stored else 'refused'} {time.perf_counter() - began}")
    sys.stdin.read()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
