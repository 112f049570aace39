"""The suite is only worth shipping if each broken codec fails the rule it breaks."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

from lmcache.core.codec import Codec
from lmcache.core.errors import BackendError
from lmcache.testing import CodecSuite

pytest_plugins = ["pytester"]

HEAD = struct.Struct("<II")


class Sound(Codec):
    """Keeps every rule. The broken ones below differ by one mistake."""

    name = "sound"

    def encode(self, data):
        size = struct.pack("<I", data.nbytes)
        body = zlib.compress(data, 1)
        return size + struct.pack("<I", zlib.crc32(size + body)) + body

    def head(self, packed):
        if len(packed) < HEAD.size:
            raise BackendError("no head")
        size, checksum = HEAD.unpack_from(packed)
        if checksum != zlib.crc32(bytes(packed[:4]) + packed[8:]):
            raise BackendError("damaged")
        return size

    def decode_into(self, packed, out):
        size = self.head(packed)
        if size > out.nbytes:
            return None
        if size:
            out.cast("B")[:size] = zlib.decompress(packed[8:])
        return size

    def max_encoded_size(self, size):
        return 64 + size + size // 1000


class LosesTheEmpty(Sound):
    def encode(self, data):
        return super().encode(data) if data.nbytes else b""


class ChangesHeaders(Sound):
    lossless = False

    def encode(self, data):
        changed = bytearray(data)
        if changed[:3] == b"LMC":
            changed[16] ^= 1
        return super().encode(memoryview(changed))


class ExceedsItsBound(Sound):
    def max_encoded_size(self, size):
        return size


class WorksInPlace(Sound):
    def encode(self, data):
        if not data.readonly and data.nbytes:
            data.cast("B")[-1] ^= 1
        return super().encode(data)


class ClearsTheRest(Sound):
    def decode_into(self, packed, out):
        size = super().decode_into(packed, out)
        out.cast("B")[size:] = bytes(out.nbytes - size)
        return size


class CutsToFit(Sound):
    def decode_into(self, packed, out):
        size = min(self.head(packed), out.nbytes)
        data = zlib.decompress(packed[8:])[:size]
        if data:
            out.cast("B")[:size] = data
        return size


class UnpacksFirst(Sound):
    def decode_into(self, packed, out):
        self.head(packed)
        data = zlib.decompress(packed[8:])
        if len(data) > out.nbytes:
            return None
        if data:
            out.cast("B")[: len(data)] = data
        return len(data)


class CountsItems(Sound):
    def encode(self, data):
        size = struct.pack("<I", len(data))
        body = zlib.compress(data, 1)
        return size + struct.pack("<I", zlib.crc32(size + body)) + body


class ChecksNothing(Sound):
    def head(self, packed):
        if len(packed) < HEAD.size:
            raise BackendError("no head")
        return HEAD.unpack_from(packed)[0]

    def decode_into(self, packed, out):
        size = self.head(packed)
        if size > out.nbytes:
            return None
        try:
            data = zlib.decompressobj(15).decompress(packed[8:], size) if size else b""
        except zlib.error as error:
            raise BackendError("damaged") from error
        if data:
            out.cast("B")[: len(data)] = data
        return size


class IgnoresWhatFollows(Sound):
    """Its checksum is of what was there when it was packed."""

    def encode(self, data):
        packed = super().encode(data)
        return struct.pack("<I", len(packed)) + packed

    def decode_into(self, packed, out):
        if len(packed) < 4:
            raise BackendError("no head")
        (size,) = struct.unpack_from("<I", packed)
        return super().decode_into(packed[4 : 4 + size], out)


class RaisesItsOwn(Sound):
    def head(self, packed):
        if packed and packed[0] == packed[-1] == 0 == sum(packed):
            raise ValueError("nothing but zeros")
        return super().head(packed)


class SharesItsMemory(Sound):
    def encode(self, data):
        self.size = data.nbytes
        self.body = zlib.compress(data, 1)
        size = struct.pack("<I", self.size)
        return size + struct.pack("<I", zlib.crc32(size + self.body)) + self.body


BROKEN = {
    LosesTheEmpty: "test_bytes_that_are_no_object_come_back",
    ChangesHeaders: "test_an_object_comes_back_as_promised",
    ExceedsItsBound: "test_the_bound_holds",
    WorksInPlace: "test_packing_leaves_an_object_as_it_is",
    ClearsTheRest: "test_a_larger_buffer_is_filled_at_its_front_only",
    CutsToFit: "test_an_object_larger_than_the_buffer_is_none",
    UnpacksFirst: "test_an_object_too_large_takes_no_memory",
    CountsItems: "test_a_view_of_any_format_is_its_bytes",
    ChecksNothing: "test_a_flipped_bit_is_found_wherever_it_is",
    IgnoresWhatFollows: "test_a_packed_object_of_another_length_is_an_error",
    RaisesItsOwn: "test_what_was_never_packed_is_an_error",
    SharesItsMemory: "test_threads_do_not_get_in_each_others_way",
}

MODULE = """
import sys
sys.path.insert(0, {here!r})

import pytest
import {module} as codecs
from lmcache.testing import CodecSuite
"""

SUITE = """
class Test{codec}(CodecSuite):
    @pytest.fixture
    def codec(self):
        return codecs.{codec}()
"""

REPLACED = """
    def test_the_bound_holds(self):
        pass
"""


def write_suites(pytester: pytest.Pytester, *codecs: type[Codec], more: str = "") -> None:
    here = Path(__file__)
    suites = [SUITE.format(codec=codec.__name__) for codec in codecs]
    module = MODULE.format(here=str(here.parent), module=here.stem)
    pytester.makepyfile(test_it="".join([module, *suites, more]))


def test_each_broken_codec_fails_its_rule(pytester: pytest.Pytester) -> None:
    write_suites(pytester, *BROKEN)
    rules = [f"test_it.py::Test{codec.__name__}::{rule}" for codec, rule in BROKEN.items()]
    result = pytester.runpytest_subprocess("--tb=no", *rules)
    failed = {re.split(r"[ []", line)[1] for line in result.outlines if line.startswith("FAILED")}
    assert failed == set(rules)


def test_every_rule_has_a_codec_that_breaks_it() -> None:
    rules = {name for name in vars(CodecSuite) if name.startswith("test_")}
    assert set(BROKEN.values()) == rules - {"test_the_suite_is_whole"}


def test_a_sound_codec_passes(pytester: pytest.Pytester) -> None:
    write_suites(pytester, Sound)
    result = pytester.runpytest_subprocess()
    assert set(result.parseoutcomes()) == {"passed"}


def test_a_rule_cannot_be_replaced(pytester: pytest.Pytester) -> None:
    write_suites(pytester, Sound, more=REPLACED)
    result = pytester.runpytest_subprocess("-k", "whole")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*test_the_bound_holds is replaced; mark it xfail*"])
