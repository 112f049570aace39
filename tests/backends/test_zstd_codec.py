from __future__ import annotations

import sys

import numpy as np
import pytest

from lmcache.backends.envelope import wrap
from lmcache.backends.zstd_codec import Zstd, lmcache_codecs
from lmcache.core.errors import BackendError, ConfigError
from lmcache.testing import CodecSuite

zstandard = pytest.importorskip("zstandard", reason="install lmcache[zstd]")


@pytest.fixture
def codec():
    (spec,) = lmcache_codecs()
    return spec.create()


class TestZstd(CodecSuite):
    @pytest.fixture
    def codec(self, codec):
        assert codec.name == "zstd"
        return codec


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmcache\[zstd\]'"):
        Zstd()


def crafted(packed, size=100):
    """An object of one plane, whoever made it: its checksum is right."""
    table = np.array([len(packed)], "<u4").tobytes()
    return memoryview(wrap(Zstd.mark, 1, size, [table, packed]))


@pytest.mark.parametrize("size", [0, 99, 101, 64 << 20])
def test_a_plane_of_another_length_is_an_error(codec, size):
    packed = zstandard.compress(bytes(size), 19)
    with pytest.raises(BackendError, match="damaged"):
        codec.decode_into(crafted(packed), memoryview(bytearray(100)))


def test_a_plane_that_is_no_zstd_is_an_error(codec):
    with pytest.raises(BackendError, match="damaged"):
        codec.decode_into(crafted(b"not zstd"), memoryview(bytearray(100)))


def test_a_window_larger_than_any_of_ours_is_refused(codec):
    """It would cost memory that nobody has been asked for."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = writer.compress(bytes(100)) + writer.flush()
    with pytest.raises(BackendError, match="damaged"):
        codec.decode_into(crafted(packed), memoryview(bytearray(100)))
