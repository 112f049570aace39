"""A file may come back damaged in any way: then it is a miss, and never wrong bytes in a page."""

from __future__ import annotations

from pathlib import Path

import pytest
import rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache.backends.disk import DiskBackend
from lmcache.backends.segments import path_of
from lmcache.core.objects import MAX_SLICES, TAGS
from lmcache.core.slab import WORD

SEQUENCE = rig.tokens(rig.CHUNK_TOKENS)
TABLE = list(range(rig.PAGES_PER_CHUNK))
WORDS = range(TAGS, TAGS + MAX_SLICES * WORD.size)
"""Where the movers write that they are done, in a slot; in a file they mean nothing."""
FIELDS = {
    "magic": 0,
    "version": 8,
    "header bytes": 10,
    "pages": 12,
    "payload bytes": 16,
    "key": 24,
    "layout": 56,
    "checksum": 88,
    "the last field": 96,
    "the header's end": 127,
    "a payload's end": -1,
}
again = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Stored:
    """A cache over a directory that holds one object."""

    def __init__(self, workshop, root: Path, *, direct):
        self.files = DiskBackend(root, min_free=0, direct=direct)
        self.engine = workshop.engine(4, self.files)
        chain = self.engine.chain(SEQUENCE)
        [self.key] = chain.full(len(SEQUENCE))
        self.engine.pages.compute(SEQUENCE, TABLE)
        self.engine.store(chain, TABLE)
        self.engine.tiers.flush()
        out = memoryview(bytearray(1 << 20))
        self.whole = bytes(out[: self.files.get_into(self.key, out)])

    def tokens_with(self, data: bytes) -> int:
        """How many are hit if the file holds `data` where the object lies, and ends there."""
        assert self.files.put(self.key, memoryview(self.whole))
        place = self.files._catalog.find(self.key)
        with open(path_of(self.files.directory, place.segment), "r+b") as file:
            file.seek(place.offset)
            file.write(data)
            if len(data) < len(self.whole):
                file.truncate()
            found = self.tokens()
            file.seek(place.offset)
            self.lies = file.read(len(data))
        return found

    def tokens_of(self, data: bytes) -> int:
        """How many are hit if `data` is the object."""
        assert self.files.put(self.key, memoryview(data))
        return self.tokens()

    def tokens(self) -> int:
        """How many are hit; their pages are what they must be."""
        engine = self.engine
        engine.decider.clear()
        engine.pages.poison()
        receipt = engine.retrieve(engine.lookup(engine.chain(SEQUENCE)), TABLE)
        assert engine.pages.wrong(SEQUENCE, TABLE, receipt.tokens) == []
        assert engine.pages.untouched(except_for=TABLE[: receipt.tokens // rig.PAGE_TOKENS])
        return receipt.tokens

    def is_there(self) -> bool:
        return self.files.contains(self.key)

    def damaged(self) -> int:
        return self.engine.decider.counters.values["damaged", "t0"]


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def stored(request, workshop, tmp_path):
    return Stored(workshop, tmp_path, direct=None if request.param else False)


def flipped(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def test_an_undamaged_file_is_a_hit(stored):
    assert stored.tokens_with(stored.whole) == len(SEQUENCE)
    assert stored.damaged() == 0


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_in_a_field_is_a_miss(stored, field):
    for bit in range(8):
        assert stored.tokens_with(flipped(stored.whole, FIELDS[field], bit)) == 0
        assert stored.damaged() == bit + 1
        assert not stored.is_there()
        assert stored.lies == flipped(stored.whole, FIELDS[field], bit)


@again
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_a_miss(stored, data):
    at = data.draw(st.integers(0, len(stored.whole) - 1), label="at")
    hit = stored.tokens_with(flipped(stored.whole, at, data.draw(st.integers(0, 7), label="bit")))
    assert hit == (len(SEQUENCE) if at in WORDS else 0)


@again
@given(data=st.data())
def test_any_truncation_is_a_miss_and_goes(stored, data):
    length = data.draw(st.integers(0, len(stored.whole) - 1), label="length")
    assert stored.tokens_with(stored.whole[:length]) == 0
    assert not stored.is_there()


@again
@given(data=st.data())
def test_a_hole_of_blocks_that_were_never_written_is_a_miss(stored, data):
    """What a power failure leaves of a file whose bytes did not all arrive."""
    at = data.draw(st.integers(0, len(stored.whole) - 1), label="from")
    holed = stored.whole[:at].ljust(len(stored.whole), b"\0")
    if holed != stored.whole:
        assert stored.tokens_with(holed) == 0


def test_a_longer_object_is_a_miss_and_stays(stored):
    """It is another's, whose chunks are larger."""
    assert stored.tokens_of(stored.whole.ljust(1 << 20, b"\0")) == 0
    assert stored.is_there()
    assert len(stored.whole) < 1 << 20


@again
@given(noise=st.binary(max_size=9000))
def test_noise_is_a_miss(stored, noise):
    assert stored.tokens_of(noise) == 0
