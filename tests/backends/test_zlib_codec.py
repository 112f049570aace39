from __future__ import annotations

import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.backends.zlib_codec import ZlibCodec, lmcache_codecs
from lmcache.core.errors import BackendError
from lmcache.testing import CodecSuite

CODEC = ZlibCodec()


class TestZlib(CodecSuite):
    @pytest.fixture
    def codec(self):
        return CODEC


def decoded(packed: bytes, room: int) -> bytes | None:
    out = memoryview(bytearray([0xA5]) * room)
    length = CODEC.decode_into(memoryview(packed), out)
    if length is None:
        return None
    assert out[length:] == bytes([0xA5]) * (room - length)
    return bytes(out[:length])


@given(st.binary(), st.integers(0, 64))
def test_what_is_encoded_is_decoded(data, spare):
    packed = CODEC.encode(memoryview(data))
    assert decoded(packed, len(data) + spare) == data


@given(st.binary(max_size=512), st.data())
def test_damage_is_an_error(data, draw):
    packed = bytearray(CODEC.encode(memoryview(data)))
    packed[draw.draw(st.integers(0, len(packed) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        # a bit that means nothing, or one that makes it longer
        assert decoded(bytes(packed), len(data)) in (data, None)
    except BackendError:
        pass


@given(st.binary(max_size=512), st.data())
def test_every_truncation_is_an_error(data, draw):
    packed = CODEC.encode(memoryview(data))
    with pytest.raises(BackendError, match="damaged"):
        decoded(packed[: draw.draw(st.integers(0, len(packed) - 1))], len(data))


@pytest.mark.parametrize("size", [0, 1, 63, 0xFFFF, 0x10000, 3 * 0xFFFF + 7, 5 << 20])
@pytest.mark.parametrize("source", [os.urandom, bytes], ids=["random", "zeros"])
def test_the_bound_holds(source, size):
    data = source(size)
    packed = CODEC.encode(memoryview(data))
    assert len(packed) <= CODEC.max_encoded_size(size)
    assert zlib.decompress(packed) == data
    assert decoded(packed, size) == data


def test_the_bound_is_reached_where_zlib_would_exceed_it():
    data = os.urandom(1 << 20)
    assert len(zlib.compress(data, 1)) > CODEC.max_encoded_size(len(data))
    assert len(CODEC.encode(memoryview(data))) == CODEC.max_encoded_size(len(data))


def test_zeros_shrink():
    assert len(CODEC.encode(memoryview(bytes(1 << 20)))) < 10_000


def test_views_of_any_format():
    data = memoryview(os.urandom(256)).cast("I")
    packed = CODEC.encode(data)
    out = memoryview(bytearray(256)).cast("H")
    assert CODEC.decode_into(memoryview(packed), out) == 256
    assert out.tobytes() == data.tobytes()


def test_what_follows_the_object_is_an_error():
    packed = CODEC.encode(memoryview(b"object"))
    with pytest.raises(BackendError, match="its end is not where it should be"):
        decoded(packed + b"x", 6)


def test_a_bomb_is_not_unpacked():
    packed = zlib.compress(bytes(64 << 20), 9)
    assert CODEC.decode_into(memoryview(packed), memoryview(bytearray(1000))) is None


def test_it_is_offered():
    (spec,) = lmcache_codecs()
    assert spec.name == "zlib"
    assert isinstance(spec.create(), ZlibCodec)
