from __future__ import annotations

import pytest

from lmcache.core.keys import ChunkKey
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.objects import (
    HEADER_BYTES,
    Description,
    is_intact,
    layouts_text,
    seal,
    start_header,
)
from lmcache.core.payload import dtype_of, is_object

KEY = ChunkKey(bytes(range(32)))


def sealed(text):
    about = Description(KEY, KEY, bytes(32), 1, 100, text)
    view = memoryview(bytearray(HEADER_BYTES + 100))
    start_header(view, about)
    seal(view)
    return view, about


def layout(*dtypes):
    regions = [
        region_of(f"layer.{n}", 4096 * n, (4, 8), (8, 1), itemsize=2, dtype=dtype, page_axis=0)
        for n, dtype in enumerate(dtypes)
    ]
    return PageLayout(tuple(regions), page_tokens=1, kind="CPU_ATTN/x86 [with] 3 x 4 words")


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16"])
def test_the_dtype_is_what_every_region_says(dtype):
    text = layouts_text([layout(dtype, dtype).summary, layout(dtype).summary])
    view, _ = sealed(text)
    assert dtype_of(view) == "bfloat16"
    assert dtype_of(view[:HEADER_BYTES]) == "bfloat16"


@pytest.mark.parametrize(
    "summaries",
    [
        [layout("bfloat16", "uint8").summary],
        [layout("bfloat16").summary, layout("float16").summary],
        [layout("bfloat16").summary + "\nsomething else"],
        ["v1 of no regions"],
        [],
    ],
    ids=["regions differ", "slices differ", "not understood", "no regions", "no layouts"],
)
def test_what_is_not_said_of_all_is_not_known(summaries):
    view, _ = sealed(layouts_text(summaries))
    assert dtype_of(view) is None


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"null", b'{"layouts":3}', b'{"layouts":[3]}', b"\xff", b'{"lay']
)
def test_a_header_without_layouts_says_nothing(text):
    view, _ = sealed(text)
    assert dtype_of(view) is None


def test_a_changed_payload_is_sealed_anew():
    view, about = sealed(b"")
    view[HEADER_BYTES + 3] ^= 1
    assert not is_intact(view, about)
    seal(view)
    assert is_intact(view, about)


def test_sealing_anew_vouches_for_nothing_but_the_payload():
    view, about = sealed(layouts_text(["a"]))
    view[20] ^= 1
    seal(view)
    assert not is_intact(view, about)


def test_what_is_no_object():
    view, _ = sealed(b"")
    for data in (view[: HEADER_BYTES - 1], memoryview(bytearray(HEADER_BYTES + 1)), view[:0]):
        assert not is_object(data)
