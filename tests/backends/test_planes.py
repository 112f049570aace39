from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.backends.envelope import wrap
from lmcache.backends.planes import BLOCK, PlaneCodec
from lmcache.core.errors import BackendError
from lmcache.testing import CodecSuite


class Runs:
    """Packs planes of one repeated byte, and no others: what it can do is easy to predict."""

    name = "runs"
    mark = b"TESTRUNS"

    def packer(self):
        def pack(plane):
            value = bytes(plane[:1])
            return value if plane == value * len(plane) else bytes(plane) + b"x"

        return pack

    def unpacker(self):
        def unpack(packed, plane):
            plane[:] = bytes(packed) * len(plane)

        return unpack


CODEC = PlaneCodec(Runs())


class TestPlanes(CodecSuite):
    @pytest.fixture
    def codec(self):
        return CODEC


def decoded(packed, room):
    out = memoryview(bytearray(room))
    return bytes(out[: CODEC.decode_into(memoryview(packed), out)])


@given(st.binary(max_size=64), st.integers(1, 200_000))
def test_what_is_encoded_is_decoded(data, times):
    whole = data * (times // max(1, len(data)))
    assert decoded(CODEC.encode(memoryview(whole)), len(whole)) == whole


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_constant_plane_is_found_whatever_the_width_of_its_numbers(width):
    count = 3 * BLOCK // width + 5
    digits = np.frombuffer(os.urandom(count * width), np.uint8).reshape(count, width).copy()
    digits[:, -1] = 7
    packed = CODEC.encode(memoryview(digits.tobytes()))
    assert len(packed) < count * (width - 1) + 1000
    assert decoded(packed, digits.size) == digits.tobytes()


def test_what_does_not_shrink_is_kept_as_it_is():
    data = os.urandom(5 << 20)
    packed = CODEC.encode(memoryview(data))
    assert len(packed) < len(data) + 100
    assert data in packed


def test_a_misleading_sample_costs_no_correctness():
    data = bytearray(os.urandom(4 << 20))
    for start in range(0, len(data), len(data) // 8):
        data[start : start + 4096] = bytes(4096)
    packed = CODEC.encode(memoryview(data))
    assert len(packed) <= CODEC.max_encoded_size(len(data))
    assert decoded(packed, len(data)) == data


@pytest.mark.parametrize(
    ("width", "size", "body"),
    [
        (0, 100, bytes(100)),
        (3, 99, bytes(99)),
        (2, 99, bytes(107)),
        (1, 100, b""),
        (1, 100, b"\xff\xff\xff\xff" + bytes(100)),
        (1, 100, b"\x64\0\0\0" + bytes(101)),
        (4, 100, bytes(16)[:15]),
    ],
    ids=["no width", "odd width", "half a number", "no table", "too long", "more", "half a table"],
)
def test_a_body_that_contradicts_itself_is_an_error(width, size, body):
    with pytest.raises(BackendError, match="a packed object"):
        decoded(wrap(Runs.mark, width, size, [body]), 100)
