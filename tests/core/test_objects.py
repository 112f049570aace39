"""An object is intact only if every byte of it is as it was sealed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from lmcache.core.objects import (
    HEADER_BYTES,
    MAGIC,
    TAGS,
    VERSION,
    Description,
    is_intact,
    seal,
    start_header,
)
from lmcache.core.slab import WORD

ABOUT = Description(bytes(range(32)), bytes(range(32, 64)), 3, 300)
PAYLOAD = bytes(i * 7 % 256 for i in range(300))

# changing a byte of this makes everything stored anywhere unreadable: raise VERSION with it
GOLDEN_HEADER = (
    "4c4d434f424a0d0a"  # magic
    "0100"  # version
    "8002"  # header bytes
    "03000000"  # pages
    "2c01000000000000"  # payload bytes
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # key
    "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"  # layout
    "2ada9855fb8a55e2"  # xxh3 of the payload
    "0000000000000000000000000000000000000000000000000000000000000000"  # spare
)


def sealed(about=ABOUT, payload=PAYLOAD, background=0xEE):
    """A sealed object in memory that held something else before."""
    data = bytearray([background]) * (HEADER_BYTES + len(payload))
    data[HEADER_BYTES:] = payload
    seal(memoryview(data), about)
    return data


def test_the_bytes_of_a_header():
    assert sealed()[:TAGS].hex() == GOLDEN_HEADER
    assert HEADER_BYTES == 640


def test_the_checksum_is_of_the_payload():
    checksum = struct.unpack_from("<Q", sealed(), 88)[0]
    assert checksum == xxh3_64_intdigest(PAYLOAD)


def test_a_header_says_nothing_of_what_was_there_before():
    """Nothing of another request's bytes may leave the process in an unused field."""
    assert sealed(background=0xEE)[:TAGS] == sealed(background=0x11)[:TAGS]


def test_a_sealed_object_is_intact():
    data = sealed()
    before = bytes(data)
    assert is_intact(memoryview(data), ABOUT)
    assert data == before, "looking at it changed it"


def test_an_object_of_no_bytes():
    about = Description(ABOUT.key, ABOUT.layout, 0, 0)
    assert is_intact(memoryview(sealed(about, b"")), about)


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_is_found(bit):
    data = sealed()
    view = memoryview(data)
    unnoticed = []
    for at in range(len(data)):
        data[at] ^= 1 << bit
        if is_intact(view, ABOUT):
            unnoticed.append(at)
        data[at] ^= 1 << bit
    assert unnoticed == list(range(TAGS, HEADER_BYTES)), "only the movers' words may change"


def test_any_truncation_is_found():
    data = sealed()
    for length in range(len(data)):
        assert not is_intact(memoryview(data)[:length], ABOUT)


def test_more_bytes_than_described_are_not_it():
    assert not is_intact(memoryview(sealed() + b"\0"), ABOUT)


@pytest.mark.parametrize(
    "other",
    [
        Description(bytes(32), ABOUT.layout, 3, 300),
        Description(ABOUT.key, bytes(32), 3, 300),
        Description(ABOUT.layout, ABOUT.key, 3, 300),
        Description(ABOUT.key, ABOUT.layout, 2, 300),
        Description(ABOUT.key, ABOUT.layout, 3, 299),
        Description(ABOUT.key, ABOUT.layout, 3, 301),
    ],
    ids=["key", "layout", "swapped", "pages", "shorter", "longer"],
)
def test_another_object_is_not_it(other):
    assert not is_intact(memoryview(sealed()), other)
    assert is_intact(
        memoryview(sealed(other, PAYLOAD[: other.payload_bytes].ljust(other.payload_bytes, b"x"))),
        other,
    )


@given(st.binary(max_size=2000))
def test_noise_is_no_object(noise):
    assert not is_intact(memoryview(bytearray(noise)), ABOUT)
    padded = noise.ljust(HEADER_BYTES + ABOUT.payload_bytes, b"\0")
    assert not is_intact(memoryview(bytearray(padded)), ABOUT)


class TestAStartedHeader:
    def test_is_not_intact(self):
        data = bytearray(HEADER_BYTES) + PAYLOAD
        start_header(memoryview(data), ABOUT)
        assert not is_intact(memoryview(data), ABOUT)

    def test_withdraws_a_sealed_object(self):
        data = sealed()
        start_header(memoryview(data), ABOUT)
        assert not is_intact(memoryview(data), ABOUT)

    def test_clears_the_words_of_all_movers(self):
        data = bytearray(b"\xff" * (HEADER_BYTES + 300))
        start_header(memoryview(data), ABOUT)
        assert not any(data[TAGS:HEADER_BYTES])
        assert data[HEADER_BYTES:] == b"\xff" * 300, "the payload is the movers' to write"

    def test_differs_from_a_sealed_one_in_the_checksum_only(self):
        data = bytearray(HEADER_BYTES) + PAYLOAD
        start_header(memoryview(data), ABOUT)
        done = sealed()
        assert data[:88] == done[:88]
        assert data[88:96] == bytes(8)
        assert data[96:TAGS] == done[96:TAGS]


def test_sealing_leaves_the_movers_words_alone():
    data = bytearray(HEADER_BYTES) + PAYLOAD
    start_header(memoryview(data), ABOUT)
    WORD.pack_into(data, TAGS + 8, 42)
    seal(memoryview(data), ABOUT)
    assert WORD.unpack_from(data, TAGS + 8) == (42,)
    assert (data[:8], VERSION) == (MAGIC, 1)
