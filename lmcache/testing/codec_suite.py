"""The contract of `Codec`, as tests anyone can run."""

from __future__ import annotations

import inspect
import os
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lmcache.core.errors import BackendError
from lmcache.core.keys import ChunkKey
from lmcache.core.objects import HEADER_BYTES, Description, layouts_text, seal, start_header
from lmcache.testing.backend_suite.tools import at_once, blank

if TYPE_CHECKING:
    from lmcache.core.codec import Codec

SIZES = (0, 1, 63, 4096, 3 * 4096 + 7, (2 << 20) + 12)
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
"""Bytes of a number of each kind."""
LARGE = 32 << 20


def random_bytes(size: int) -> bytes:
    """What no codec can shrink."""
    return os.urandom(size)


def zeros(size: int) -> bytes:
    """What every codec can shrink."""
    return bytes(size)


def numbers(size: int, dtype: str = "float32") -> bytes:
    """Numbers as they are in KV: most of them near 1, some large, some small."""
    width = DTYPES[dtype]
    drawn = np.random.default_rng().normal(size=-(-size // width)).astype(np.float32)
    if dtype == "bfloat16":
        return (drawn.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:size]
    return drawn.astype(dtype, casting="unsafe").tobytes()[:size]


def stored_object(dtype: str, size: int = 5000) -> memoryview:
    """An object as it is written to a tier, of `size` bytes of numbers."""
    layout = f"v1 suite 1 region x1\n1 x {size} {dtype} [{size}] x1 in order [0]"
    key, root = ChunkKey(os.urandom(32)), ChunkKey(os.urandom(32))
    about = Description(key, root, os.urandom(32), 1, size, layouts_text([layout]))
    view = memoryview(bytearray(HEADER_BYTES) + numbers(size, dtype))
    start_header(view, about)
    seal(view)
    return view


def decoded(codec: Codec, packed: bytes | memoryview, room: int) -> bytes | None:
    """What `packed` holds, with room for `room` bytes; None if that is too little."""
    out = blank(room)
    length = codec.decode_into(memoryview(packed), out)
    if length is None:
        assert out == blank(room), "an object that does not fit has left bytes behind"
        return None
    assert 0 <= length <= room
    assert out[length:] == blank(room - length), "bytes behind the object were changed"
    return bytes(out[:length])


def assert_found(codec: Codec, damaged: bytes, undamaged: bytes) -> None:
    """Damage is an error, unless it is to bits that mean nothing, or makes it too large."""
    try:
        data = decoded(codec, damaged, len(undamaged))
    except BackendError:
        return
    assert data is None or data == undamaged, "damage was taken for an object"


class CodecSuite:
    """Subclass, provide `codec`, and every rule below is checked."""

    @pytest.fixture
    def codec(self) -> Codec:
        """The codec."""
        raise NotImplementedError("override the codec fixture")

    def test_the_suite_is_whole(self) -> None:
        """A rule may be marked xfail with a reason; it may not be replaced."""
        for name, rule in inspect.getmembers(CodecSuite, inspect.isfunction):
            mine = getattr(type(self), name)
            if not name.startswith("test_") or mine is rule:
                continue
            marks = getattr(mine, "pytestmark", [])
            assert any(m.name == "xfail" and m.kwargs.get("reason") for m in marks), (
                f"{name} is replaced; mark it xfail(reason=...) instead"
            )

    @pytest.mark.parametrize("size", SIZES)
    def test_bytes_that_are_no_object_come_back(self, codec: Codec, size: int) -> None:
        for source in (random_bytes, zeros, numbers):
            data = source(size)
            assert decoded(codec, codec.encode(memoryview(data)), size) == data

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_object_comes_back_as_promised(self, codec: Codec, dtype: str) -> None:
        data = stored_object(dtype)
        back = decoded(codec, codec.encode(data), data.nbytes)
        assert back is not None
        assert len(back) == data.nbytes
        assert back[:HEADER_BYTES] == data[:HEADER_BYTES]
        if codec.lossless:
            assert back == data

    @pytest.mark.parametrize("size", SIZES)
    def test_the_bound_holds(self, codec: Codec, size: int) -> None:
        for source in (random_bytes, zeros, numbers):
            assert len(codec.encode(memoryview(source(size)))) <= codec.max_encoded_size(size)
        for dtype in DTYPES:
            data = stored_object(dtype, size)
            assert len(codec.encode(data)) <= codec.max_encoded_size(data.nbytes)

    def test_packing_leaves_an_object_as_it_is(self, codec: Codec) -> None:
        for dtype in DTYPES:
            data = stored_object(dtype)
            before = bytes(data)
            codec.encode(data)
            codec.encode(data.toreadonly())
            assert data == before

    def test_a_larger_buffer_is_filled_at_its_front_only(self, codec: Codec) -> None:
        data = random_bytes(5000)
        assert decoded(codec, codec.encode(memoryview(data)), 9000) == data

    def test_an_object_larger_than_the_buffer_is_none(self, codec: Codec) -> None:
        for data in (random_bytes(5000), zeros(5000)):
            assert decoded(codec, codec.encode(memoryview(data)), 4999) is None

    def test_an_object_too_large_takes_no_memory(self, codec: Codec) -> None:
        """However small its bytes are, no more is unpacked than there is room for."""
        packed = codec.encode(memoryview(zeros(LARGE)))
        tracemalloc.start()
        try:
            assert decoded(codec, packed, 1000) is None
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < LARGE // 8

    def test_a_view_of_any_format_is_its_bytes(self, codec: Codec) -> None:
        data = memoryview(random_bytes(64))
        for view in (data, data.cast("I"), data.cast("B", [2, 4, 8])):
            packed = memoryview(codec.encode(view))
            out = blank(64)
            assert codec.decode_into(packed, out.cast("H")) == 64
            assert out == data

    def test_a_flipped_bit_is_found_wherever_it_is(self, codec: Codec) -> None:
        for data in (memoryview(numbers(300)), stored_object("bfloat16", 512)):
            packed = codec.encode(data)
            undamaged = decoded(codec, packed, data.nbytes)
            assert undamaged is not None
            for at in range(len(packed)):
                damaged = bytearray(packed)
                damaged[at] ^= 1 << at % 8
                assert_found(codec, bytes(damaged), undamaged)

    def test_a_packed_object_of_another_length_is_an_error(self, codec: Codec) -> None:
        for data in (memoryview(numbers(300)), stored_object("bfloat16", 512)):
            packed = codec.encode(data)
            for wrong in (*(packed[:stop] for stop in range(len(packed))), packed + b"\0"):
                with pytest.raises(BackendError):
                    decoded(codec, wrong, data.nbytes)

    def test_what_was_never_packed_is_an_error(self, codec: Codec) -> None:
        for size in SIZES:
            for source in (random_bytes, zeros, numbers):
                with pytest.raises(BackendError):
                    decoded(codec, source(size), size)

    def test_threads_do_not_get_in_each_others_way(self, codec: Codec) -> None:
        def work(size: int) -> None:
            for _ in range(10):
                data = random_bytes(size) + zeros(size)
                assert decoded(codec, codec.encode(memoryview(data)), 2 * size) == data

        at_once(*(lambda size=100_000 + n: work(size) for n in range(8)))


__all__ = ["CodecSuite"]
