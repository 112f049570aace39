"""A packed backend is a backend, and damage to what it packed is seen."""

from __future__ import annotations

import os
import threading
import tracemalloc

import numpy as np
import pytest

from lmcache.backends.fp8_codec import Fp8Codec
from lmcache.backends.memory import MemoryBackend
from lmcache.backends.zlib_codec import ZlibCodec
from lmcache.core.assembly import assemble
from lmcache.core.config import load_config
from lmcache.core.engine import CacheEngine
from lmcache.core.errors import ConfigError
from lmcache.core.keys import ChunkKey, Namespace
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.objects import HEADER_BYTES
from lmcache.core.packing import KEPT, Buffers, Packed
from lmcache.plugins.manager import PluginManager
from lmcache.testing import BackendSuite
from lmcache.testing.codec_suite import numbers, stored_object
from lmcache.testing.faults import Wrapper

CODECS = ["zlib", "zstd", "lz4", "fp8"]


@pytest.fixture(params=CODECS)
def codec(request):
    return PluginManager(entry_points=False).create_codec(request.param)


class TestPacked(BackendSuite):
    @pytest.fixture
    def open_backend(self, codec):
        return lambda: Packed(MemoryBackend(), codec)


KEY = ChunkKey(bytes(32))


def test_objects_are_packed():
    inner = MemoryBackend()
    Packed(inner, ZlibCodec()).put(KEY, memoryview(bytes(100_000)))
    assert inner.get_into(KEY, memoryview(bytearray(1000))) < 1000


def test_a_damaged_object_has_no_length(codec):
    inner = MemoryBackend()
    packed = Packed(inner, codec)
    inner.put(KEY, memoryview(b"not packed at all"))
    assert packed.get_into(KEY, memoryview(bytearray(100))) == 0


def test_what_another_codec_packed_is_damage(codec):
    inner = MemoryBackend()
    other = Fp8Codec() if codec.lossless else ZlibCodec()
    Packed(inner, other).put(KEY, stored_object("bfloat16"))
    assert Packed(inner, codec).get_into(KEY, memoryview(bytearray(1 << 20))) == 0


def open_tiers(url):
    extra = {"lmcache.l2": url, "lmcache.max_local_cpu_size": 0.01}
    return assemble(load_config(extra, {}).config, PluginManager(entry_points=False))


@pytest.mark.parametrize("name", CODECS)
def test_a_url_names_the_codec_of_its_tier(name):
    decider, tiers = open_tiers(f"memory://?codec={name}")
    assert isinstance(tiers._tiers[0].backend, Packed)
    assert tiers._tiers[0].backend._codec.name == name
    assert tiers._tiers[0].exact is (name != "fp8")
    tiers.close()
    decider.slab.close()


def test_a_codec_that_nobody_has_stops_the_start():
    with pytest.raises(ConfigError, match="no codec 'zst'; known: fp8, lz4, zlib, zstd"):
        open_tiers("memory://?codec=zst")


def test_what_is_damaged_is_discarded_where_it_lies():
    class Aside(Wrapper):
        def discard_damaged(self, key):
            return f"{key.hex()} is kept"

    packed = Packed(Aside(MemoryBackend()), ZlibCodec())
    assert packed.discard_damaged(KEY) == f"{KEY.hex()} is kept"


class TestBuffers:
    def test_one_is_used_again(self):
        buffers = Buffers()
        with buffers.take(1000) as first:
            first[:] = b"x" * 1000
        with buffers.take(100) as second:
            assert second == b"x" * 100
        with buffers.take(1000) as third:
            assert third == b"x" * 1000

    def test_a_larger_one_replaces_one_that_is_too_small(self):
        buffers = Buffers()
        with buffers.take(10):
            pass
        with buffers.take(1000) as larger:
            assert len(larger) == 1000
        assert len(buffers._free) == 1

    def test_two_at_once_are_two(self):
        buffers = Buffers()
        with buffers.take(10) as one, buffers.take(10) as other:
            one[:], other[:] = b"1" * 10, b"2" * 10
            assert (one, other) == (b"1" * 10, b"2" * 10)

    def test_few_outlast_their_use(self):
        buffers = Buffers()
        barrier = threading.Barrier(3 * KEPT)

        def use():
            with buffers.take(1 << 20):
                barrier.wait(30)

        threads = [threading.Thread(target=use) for _ in range(3 * KEPT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(buffers._free) == KEPT

    def test_reading_again_takes_no_new_memory(self):
        packed = Packed(MemoryBackend(), Fp8Codec())
        packed.put(KEY, memoryview(os.urandom(4 << 20)))
        out = memoryview(bytearray(4 << 20))
        packed.get_into(KEY, out)
        # the least of several, as threads of other tests may still be at it
        assert min(self.allocated_by(lambda: packed.get_into(KEY, out)) for _ in range(5)) < 1 << 20

    @staticmethod
    def allocated_by(read):
        """Bytes that there were at most at once, in all threads."""
        tracemalloc.start()
        try:
            assert read() == 4 << 20
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


class Shelf(Wrapper):
    """Memory that outlives its tier, and whose objects tests may damage."""

    def __init__(self):
        super().__init__(MemoryBackend())

    def close(self):
        pass

    def objects(self):
        return self.backend._objects


class Engine:
    """An engine with pages of bfloat16, in front of one tier with a codec."""

    TOKENS = list(range(64))

    def __init__(self, shelf, codec, *, dtype="torch.bfloat16"):
        self.memory = np.zeros((2, 4, 16 * 256), np.uint16)
        regions = [
            region_of(
                f"layer.{n}",
                self.memory[n].ctypes.data,
                (4, 16, 256),
                (16 * 256, 256, 1),
                itemsize=2,
                dtype=dtype,
                page_axis=0,
            )
            for n in range(2)
        ]
        layout = PageLayout(tuple(regions), 16, "rig")
        offers = PluginManager(entry_points=False)
        offers.open_backend = lambda url: shelf
        config = {"lmcache.l2": f"shelf://?codec={codec}", "lmcache.max_local_cpu_size": 0.01}
        decider, tiers = assemble(load_config(config, {}).config, offers)
        namespace = Namespace(model="rig", dtype="bfloat16", layout="")
        self.cache = CacheEngine(layout, namespace, decider, tiers, chunk_size=32)

    def store(self):
        """Write numbers to all pages, store them, and return them."""
        self.memory[:] = np.frombuffer(numbers(self.memory.nbytes, "bfloat16"), np.uint16).reshape(
            self.memory.shape
        )
        self.cache.store(self.cache.chain(self.TOKENS), range(4))
        self.cache.tiers.flush()
        return self.memory.copy()

    def load(self):
        """What comes back, and the receipt of the lookup."""
        self.memory[:] = 0
        hit = self.cache.lookup(self.cache.chain(self.TOKENS))
        receipt = self.cache.retrieve(hit, range(4))
        assert receipt.tokens == hit.tokens
        return self.memory.copy(), hit.receipt


@pytest.fixture
def new_engine():
    engines = []

    def make(*args, **options):
        engines.append(Engine(*args, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.cache.close()


def floats(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


class TestATier:
    def test_what_a_lossy_one_returns_is_close_and_sealed_anew(self, new_engine):
        shelf = Shelf()
        stored = new_engine(shelf, "fp8").store()
        loaded, receipt = new_engine(shelf, "fp8").load()
        assert receipt.tokens == 64
        assert receipt.by_tier["shelf"] == 64
        want, got = floats(stored), floats(loaded)
        assert (loaded != stored).any()
        assert (np.abs(got - want) <= np.maximum(np.abs(want) / 17, 1e-4)).all()

    def test_what_fp8_keeps_is_half_as_large(self, new_engine):
        shelf = Shelf()
        new_engine(shelf, "fp8").store()
        sizes = [len(data) for data in shelf.objects().values()]
        payload = 2 * 4 * 16 * 256 * 2 // 2
        assert len(sizes) == 2
        assert all(size < HEADER_BYTES + payload * 0.51 for size in sizes)

    def test_memory_holds_what_was_stored_until_it_is_gone(self, new_engine):
        engine = new_engine(Shelf(), "fp8")
        stored = engine.store()
        assert (engine.load()[0] == stored).all()
        engine.cache.decider.clear()
        once = engine.load()[0]
        assert (once != stored).any()
        assert (engine.load()[0] == once).all()

    def test_numbers_that_fp8_does_not_know_come_back_as_they_were(self, new_engine):
        shelf = Shelf()
        stored = new_engine(shelf, "fp8", dtype="torch.int16").store()
        assert (new_engine(shelf, "fp8", dtype="torch.int16").load()[0] == stored).all()

    @pytest.mark.parametrize("name", ["zlib", "zstd", "lz4"])
    def test_what_the_others_return_is_what_was_stored(self, new_engine, name):
        shelf = Shelf()
        stored = new_engine(shelf, name).store()
        loaded, receipt = new_engine(shelf, name).load()
        assert receipt.by_tier["shelf"] == 64
        assert (loaded == stored).all()

    @pytest.mark.parametrize("name", CODECS)
    def test_damage_is_a_miss_unless_it_is_to_bits_that_mean_nothing(self, new_engine, name):
        """As the last bits of a zlib stream, which only fill its last byte."""
        shelf = Shelf()
        new_engine(shelf, name).store()
        undamaged = new_engine(shelf, name).load()[0]
        good = dict(shelf.objects())
        misses = 0
        for at in np.linspace(0, min(map(len, good.values())) - 1, 25).astype(int):
            for key, data in good.items():
                damaged = bytearray(data)
                damaged[at] ^= 0x10
                shelf.objects()[key] = bytes(damaged)
            loaded, receipt = new_engine(shelf, name).load()
            pages = receipt.tokens // 16
            assert (loaded[:, :pages] == undamaged[:, :pages]).all()
            misses += pages == 0
        assert misses >= 20
