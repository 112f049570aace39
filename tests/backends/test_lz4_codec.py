from __future__ import annotations

import sys

import numpy as np
import pytest

from lmcache.backends.envelope import wrap
from lmcache.backends.lz4_codec import Lz4, lmcache_codecs
from lmcache.core.errors import BackendError, ConfigError
from lmcache.testing import CodecSuite

block = pytest.importorskip("lz4.block", reason="install lmcache[lz4]")


@pytest.fixture
def codec():
    (spec,) = lmcache_codecs()
    return spec.create()


class TestLz4(CodecSuite):
    @pytest.fixture
    def codec(self, codec):
        assert codec.name == "lz4"
        return codec


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmcache\[lz4\]'"):
        Lz4()


def crafted(packed, size=100):
    """An object of one plane, whoever made it: its checksum is right."""
    table = np.array([len(packed)], "<u4").tobytes()
    return memoryview(wrap(Lz4.mark, 1, size, [table, packed]))


@pytest.mark.parametrize("size", [0, 99, 101, 64 << 10])
def test_a_plane_of_another_length_is_an_error(codec, size):
    packed = block.compress(bytes(size), store_size=False)
    with pytest.raises(BackendError, match="damaged"):
        codec.decode_into(crafted(packed), memoryview(bytearray(100)))


def test_a_plane_that_is_no_lz4_is_an_error(codec):
    with pytest.raises(BackendError, match="damaged"):
        codec.decode_into(crafted(b"\xff not lz4"), memoryview(bytearray(100)))
