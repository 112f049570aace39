from __future__ import annotations

import numpy as np
import pytest

from lmcache.backends.envelope import ENVELOPE_BYTES, wrap
from lmcache.backends.fp8_codec import EXACT, KINDS, MARK, Fp8Codec, lmcache_codecs
from lmcache.core.errors import BackendError
from lmcache.core.objects import HEADER_BYTES, TEXT, layouts_text
from lmcache.testing import CodecSuite
from lmcache.testing.codec_suite import stored_object

CODEC = Fp8Codec()


class TestFp8(CodecSuite):
    @pytest.fixture
    def codec(self):
        return CODEC


def decoded(packed, room):
    out = memoryview(bytearray(room))
    return out[: CODEC.decode_into(memoryview(packed), out)]


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_numbers_are_packed_in_eight_bits_each(dtype, width):
    data = stored_object(dtype, 1 << 20)
    packed = CODEC.encode(data)
    count = (1 << 20) // width
    assert len(packed) == ENVELOPE_BYTES + HEADER_BYTES + count + count // 128
    assert decoded(packed, data.nbytes) != data


def test_float32_comes_back_close():
    data = stored_object("float32", 1 << 20)
    back = decoded(CODEC.encode(data), data.nbytes)
    want, got = (np.frombuffer(view[HEADER_BYTES:], "<f4") for view in (data, back))
    assert np.abs(got - want).max() <= np.abs(want).max() / 17
    assert 0.015 < np.mean(np.abs(got - want) / np.abs(want)) < 0.03


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "float64", "float8_e4m3fn", "bf16"])
def test_numbers_of_another_dtype_are_kept_as_they_are(dtype):
    data = stored_object("bfloat16")
    text = layouts_text([f"v1 suite 1 region x1\n1 x 5000 {dtype} [5000] x1 in order [0]"])
    data[TEXT:HEADER_BYTES] = text.ljust(HEADER_BYTES - TEXT, b"\0")
    packed = CODEC.encode(data)
    assert len(packed) == ENVELOPE_BYTES + data.nbytes
    assert decoded(packed, data.nbytes) == data


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["inf", "-inf", "nan"])
def test_an_object_with_a_number_that_is_not_finite_is_kept_as_it_is(bits):
    data = stored_object("bfloat16")
    np.frombuffer(data, "<u2")[-1000] = bits
    packed = CODEC.encode(data)
    assert len(packed) == ENVELOPE_BYTES + data.nbytes
    assert decoded(packed, data.nbytes) == data


@pytest.mark.parametrize(
    ("kind", "size", "body"),
    [
        (EXACT, 5000, bytes(4999)),
        (EXACT, 5000, bytes(5001)),
        (4, 5000, bytes(5000)),
        (KINDS["bfloat16"], HEADER_BYTES - 1, bytes(HEADER_BYTES - 1)),
        (KINDS["bfloat16"], HEADER_BYTES + 256, bytes(HEADER_BYTES + 128)),
        (KINDS["bfloat16"], HEADER_BYTES + 256, bytes(HEADER_BYTES + 130)),
        (KINDS["float32"], HEADER_BYTES + 256, bytes(HEADER_BYTES + 129)),
    ],
    ids=["short", "long", "no kind", "no header", "no scale", "two scales", "another kind"],
)
def test_a_body_that_contradicts_itself_is_an_error(kind, size, body):
    packed = wrap(MARK, kind, size, [body])
    with pytest.raises(BackendError, match="a packed object"):
        decoded(packed, 10_000)


def test_whatever_the_packed_numbers_are_they_stay_inside():
    """Nobody but us packs such scales and codes, but everybody may write to a shared tier."""
    data = np.random.default_rng(0).integers(0, 256, HEADER_BYTES + 129 * 64, np.uint8)
    for dtype, width in (("bfloat16", 2), ("float16", 2), ("float32", 4)):
        size = HEADER_BYTES + 128 * width * 64
        assert decoded(wrap(MARK, KINDS[dtype], size, [data.data]), size).nbytes == size


def test_it_is_offered():
    (spec,) = lmcache_codecs()
    assert spec.name == "fp8"
    assert not spec.create().lossless
