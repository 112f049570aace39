from __future__ import annotations

import pytest
from xxhash import xxh3_64_hexdigest

from lmcache.backends.envelope import ENVELOPE_BYTES, unwrap, wrap
from lmcache.core.errors import BackendError

GOLDEN = (
    "544553544d41524b"  # mark
    "02000000"  # kind
    "00000000"  # reserved
    "2c01000000000000"  # size
    "871b91d1c166379c"  # xxh3 of the rest
    "626f6479"  # body
)


def test_the_bytes_of_an_envelope():
    packed = wrap(b"TESTMARK", 2, 300, [b"bo", memoryview(b"dy")])
    assert packed.hex() == GOLDEN
    assert xxh3_64_hexdigest(packed[:24] + packed[32:]) == packed[31:23:-1].hex()
    assert ENVELOPE_BYTES == 32


def test_it_says_what_it_was_told():
    packed = memoryview(wrap(b"TESTMARK", 2, 300, [b"body"]))
    kind, size, body = unwrap(b"TESTMARK", packed)
    assert (kind, size, bytes(body)) == (2, 300, b"body")


def test_another_mark_is_damage():
    packed = memoryview(wrap(b"TESTMARK", 0, 4, [b"body"]))
    with pytest.raises(BackendError, match="not packed by b'OTHERONE'"):
        unwrap(b"OTHERONE", packed)


@pytest.mark.parametrize("length", range(ENVELOPE_BYTES))
def test_a_head_cut_short_is_damage(length):
    packed = memoryview(wrap(b"TESTMARK", 0, 0, []))[:length]
    with pytest.raises(BackendError, match="it has no head"):
        unwrap(b"TESTMARK", packed)


def test_any_flipped_bit_is_found():
    packed = wrap(b"TESTMARK", 1, 4, [b"body"])
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BackendError, match="damaged"):
            unwrap(b"TESTMARK", memoryview(damaged))
