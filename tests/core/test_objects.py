"""An object is intact only if every byte of it is as it was sealed."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from lmcache.core.geometry import combined_layout
from lmcache.core.layout import fingerprint_of
from lmcache.core.objects import (
    HEADER_BYTES,
    MAGIC,
    TAGS,
    TEXT,
    VERSION,
    Description,
    is_intact,
    layouts_text,
    seal,
    start_header,
)
from lmcache.core.slab import WORD

ROOT = bytes(range(64, 96))
TEXT_OF_ONE = layouts_text(["v1 CPU 16 page x1\n2 x 75 uint8 [5, 15] x1 in order [0, 1]"])
ABOUT = Description(bytes(range(32)), ROOT, bytes(range(32, 64)), 3, 300, TEXT_OF_ONE)
PAYLOAD = bytes(i * 7 % 256 for i in range(300))

# changing a byte of this makes everything stored anywhere unreadable: raise VERSION with it
GOLDEN_HEADER = (
    "4c4d434f424a0d0a"  # magic
    "0300"  # version
    "8012"  # header bytes
    "03000000"  # tokens
    "2c01000000000000"  # payload bytes
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # key
    "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"  # layout
    "2ada9855fb8a55e2"  # xxh3 of the payload
    "404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"  # root
)
GOLDEN_TEXT = (
    b'{"layouts":["v1 CPU 16 page x1\\n2 x 75 uint8 [5, 15] x1 in order [0, 1]"],"slices":[0]}'
)
GOLDEN_FILE = Path(__file__).with_name("golden") / "object-v3.bin"


def sealed(about=ABOUT, payload=PAYLOAD, background=0xEE):
    """A sealed object in memory that held something else before."""
    data = bytearray([background]) * (HEADER_BYTES + len(payload))
    start_header(memoryview(data), about)
    data[TAGS:TEXT] = bytes([background]) * (TEXT - TAGS)
    data[HEADER_BYTES:] = payload
    seal(memoryview(data))
    return data


def test_the_bytes_of_a_header():
    data = sealed(background=0)
    assert data[:TAGS].hex() == GOLDEN_HEADER
    assert data[TEXT:HEADER_BYTES] == GOLDEN_TEXT.ljust(4096, b"\0")
    assert (TAGS, TEXT, HEADER_BYTES) == (128, 640, 4736)


def test_an_object_of_a_file_written_once_and_for_all():
    """Who has stored objects of this version must find them again."""
    assert GOLDEN_FILE.read_bytes() == sealed(background=0)
    assert is_intact(memoryview(GOLDEN_FILE.read_bytes()), ABOUT)


def test_the_checksum_is_of_the_payload():
    checksum = struct.unpack_from("<Q", sealed(), 88)[0]
    assert checksum == xxh3_64_intdigest(PAYLOAD)


def test_a_header_says_nothing_of_what_was_there_before():
    """Nothing of another request's bytes may leave the process in an unused field."""
    one, other = sealed(background=0xEE), sealed(background=0x11)
    assert one[:TAGS] == other[:TAGS]
    assert one[TEXT:] == other[TEXT:]


def test_a_sealed_object_is_intact():
    data = sealed()
    before = bytes(data)
    assert is_intact(memoryview(data), ABOUT)
    assert data == before, "looking at it changed it"


def test_an_object_of_no_bytes():
    about = replace(ABOUT, tokens=0, payload_bytes=0)
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
    assert unnoticed == list(range(TAGS, TEXT)), "only the movers' words may change"


def test_any_truncation_is_found():
    data = sealed()
    for length in range(len(data)):
        assert not is_intact(memoryview(data)[:length], ABOUT)


def test_more_bytes_than_described_are_not_it():
    assert not is_intact(memoryview(sealed() + b"\0"), ABOUT)


@pytest.mark.parametrize(
    "other",
    [
        replace(ABOUT, key=bytes(32)),
        replace(ABOUT, root=bytes(32)),
        replace(ABOUT, layout=bytes(32)),
        replace(ABOUT, key=ABOUT.layout, layout=ABOUT.key),
        replace(ABOUT, text=ABOUT.text + b" "),
        replace(ABOUT, tokens=2),
        replace(ABOUT, payload_bytes=299),
        replace(ABOUT, payload_bytes=301),
    ],
    ids=["key", "root", "layout", "swapped", "text", "pages", "shorter", "longer"],
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
        assert not any(data[TAGS:TEXT])
        assert data[HEADER_BYTES:] == b"\xff" * 300, "the payload is the movers' to write"

    def test_differs_from_a_sealed_one_in_the_checksum_only(self):
        data = bytearray(HEADER_BYTES) + PAYLOAD
        start_header(memoryview(data), ABOUT)
        done = sealed()
        assert data[:88] == done[:88]
        assert data[88:96] == bytes(8)
        assert data[96:TAGS] == done[96:TAGS]
        assert data[TEXT:] == done[TEXT:]


class TestWhatIsSaidOfTheLayouts:
    def test_equal_slices_are_said_once(self):
        said = json.loads(layouts_text(["a", "b", "a"]))
        assert said == {"layouts": ["a", "b"], "slices": [0, 1, 0]}

    def test_it_proves_the_digest(self):
        """Another program can check that this is what the layout's digest stands for."""
        summaries = ["v1 one", "v1 two"]
        said = json.loads(layouts_text(summaries))
        digests = [blake3(said["layouts"][i].encode()).hexdigest() for i in said["slices"]]
        ours = combined_layout([fingerprint_of(summary) for summary in summaries])
        assert blake3("\n".join(digests).encode()).digest() == ours

    def test_what_a_header_has_no_room_for_is_left_out(self):
        room = 4096 - len('{"layouts":[""],"slices":[0]}')
        assert len(layouts_text(["x" * room])) == 4096
        assert layouts_text(["x" * (room + 1)]) == b""


def test_sealing_leaves_the_movers_words_alone():
    data = bytearray(HEADER_BYTES) + PAYLOAD
    start_header(memoryview(data), ABOUT)
    WORD.pack_into(data, TAGS + 8, 42)
    seal(memoryview(data))
    assert WORD.unpack_from(data, TAGS + 8) == (42,)
    assert (data[:8], VERSION) == (MAGIC, 3)
