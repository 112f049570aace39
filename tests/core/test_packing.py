"""A packed backend is a backend, and damage to what it packed is seen."""

from __future__ import annotations

import pytest

from lmcache.backends.memory import MemoryBackend
from lmcache.backends.zlib_codec import ZlibCodec
from lmcache.core.assembly import assemble
from lmcache.core.config import load_config
from lmcache.core.keys import ChunkKey
from lmcache.core.packing import Packed
from lmcache.plugins.manager import PluginManager
from lmcache.testing import BackendSuite


class TestPacked(BackendSuite):
    @pytest.fixture
    def open_backend(self):
        return lambda: Packed(MemoryBackend(), ZlibCodec())


KEY = ChunkKey(bytes(32))


def test_objects_are_packed():
    inner = MemoryBackend()
    Packed(inner, ZlibCodec()).put(KEY, memoryview(bytes(100_000)))
    assert inner.get_into(KEY, memoryview(bytearray(1000))) < 1000


def test_a_damaged_object_has_no_length():
    inner = MemoryBackend()
    packed = Packed(inner, ZlibCodec())
    inner.put(KEY, memoryview(b"not zlib at all"))
    assert packed.get_into(KEY, memoryview(bytearray(100))) == 0


def test_a_url_names_the_codec_of_its_tier():
    extra = {"lmcache.l2": "memory://?codec=zlib", "lmcache.max_local_cpu_size": 0.001}
    decider, tiers = assemble(load_config(extra, {}).config, PluginManager(entry_points=False))
    assert isinstance(tiers._tiers[0].backend, Packed)
    tiers.close()
    decider.slab.close()
