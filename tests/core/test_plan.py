"""The planner's runs copy exactly the bytes they should, and there are no fewer that do."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.layout import PageLayout, region_of

BASE = 1 << 40


def layout_of(*tensors, page_axis=0, blocks=1):
    """A layout from (address, shape, strides) of byte tensors."""
    regions = [
        region_of(
            f"r{index}",
            base,
            shape,
            strides,
            itemsize=1,
            dtype="uint8",
            page_axis=page_axis,
            blocks_per_page=blocks,
        )
        for index, (base, shape, strides) in enumerate(tensors)
    ]
    return PageLayout(tuple(regions), 16, "test")


def runs_of(layout, *spans, region=None):
    runs = Planner(layout).plan(list(spans), region)
    return list(zip(runs.engine.tolist(), runs.stored.tolist(), runs.length.tolist(), strict=True))


# 100-byte pages one after the other, and two layers of 60 bytes inside each page
SIMPLE = layout_of((BASE, (50, 100), (100, 1)))
TWO_LAYERS = layout_of((BASE, (50, 100), (100, 1)), (BASE + 10_000, (50, 100), (100, 1)))
INTERLEAVED = layout_of((BASE, (50, 60), (120, 1)), (BASE + 60, (50, 60), (120, 1)))
HALVES = layout_of((BASE, (2, 50, 40), (2000, 40, 1)), page_axis=1)
GAPS = layout_of((BASE, (50, 3, 20), (128, 40, 1)))


@pytest.mark.parametrize(
    ("layout", "span", "expected"),
    [
        (SIMPLE, Span(0, 3, 0, [7]), [(BASE + 700, 0, 100)]),
        (SIMPLE, Span(0, 3, 0, [7, 8, 9]), [(BASE + 700, 0, 300)]),
        (SIMPLE, Span(5000, 3, 1, [7, 8]), [(BASE + 700, 5100, 200)]),
        (
            SIMPLE,
            Span(0, 4, 0, [7, 8, 3, 4]),
            [(BASE + 700, 0, 200), (BASE + 300, 200, 200)],
        ),
        (SIMPLE, Span(0, 2, 0, [8, 7]), [(BASE + 800, 0, 100), (BASE + 700, 100, 100)]),
        (SIMPLE, Span(0, 2, 0, [7, 7]), [(BASE + 700, 0, 100), (BASE + 700, 100, 100)]),
        (
            TWO_LAYERS,
            Span(0, 4, 1, [0, 1]),
            [(BASE, 100, 200), (BASE + 10_000, 500, 200)],
        ),
        (INTERLEAVED, Span(0, 3, 0, [4, 5, 6]), [(BASE + 480, 0, 360)]),
        (HALVES, Span(0, 1, 0, [3]), [(BASE + 120, 0, 40), (BASE + 2120, 40, 40)]),
        (
            GAPS,
            Span(0, 1, 0, [1]),
            [(BASE + 128, 0, 20), (BASE + 168, 20, 20), (BASE + 208, 40, 20)],
        ),
    ],
    ids=[
        "one page",
        "neighbours",
        "in the middle of an object",
        "two stretches",
        "backwards",
        "the same twice",
        "layer after layer",
        "layers inside the page",
        "two halves",
        "gaps inside the page",
    ],
)
def test_known_runs(layout, span, expected):
    assert runs_of(layout, span) == expected


def test_objects_that_touch_on_both_sides_are_one_run():
    assert runs_of(SIMPLE, Span(0, 2, 0, [2, 3]), Span(200, 2, 0, [4, 5])) == [(BASE + 200, 0, 400)]


def test_one_region_is_a_part_of_all():
    spans = [Span(0, 4, 0, [9, 1, 2]), Span(4000, 2, 1, [5])]
    for layout in (TWO_LAYERS, INTERLEAVED):
        parts = [runs_of(layout, *spans, region=index) for index in (0, 1)]
        assert bytes_of(parts[0] + parts[1]) == bytes_of(runs_of(layout, *spans))


@pytest.mark.parametrize("spans", [[], [Span(0, 4, 0, [])], [Span(0, 4, 4, [])]])
@pytest.mark.parametrize("region", [None, 0])
def test_nothing_is_no_runs(spans, region):
    runs = Planner(TWO_LAYERS).plan(spans, region)
    assert runs.total_bytes == len(runs.length) == len(runs.engine) == len(runs.stored) == 0


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Span(0, 4, 0, [50]), "page ids 50..50; the engine has 50"),
        (Span(0, 4, 0, [0, 49, 50]), "page ids 0..50; the engine has 50"),
        (Span(0, 4, 0, [-1]), "page ids -1..-1; the engine has 50"),
        (Span(0, 4, 0, [2**40]), "the engine has 50"),
        (Span(0, 4, 3, [1, 2]), "2 pages from 3 on; the object has 4"),
        (Span(0, 4, 0, [1] * 5), "5 pages from 0 on; the object has 4"),
        (Span(0, 4, -1, [1]), "1 pages from -1 on; the object has 4"),
        (Span(0, 4, 5, []), "0 pages from 5 on; the object has 4"),
    ],
    ids=["one past", "last of several", "negative", "far", "past", "too many", "before", "nowhere"],
)
def test_nothing_outside_the_pages_or_the_object_is_planned(span, message):
    for layout in (SIMPLE, TWO_LAYERS):
        with pytest.raises(IndexError, match=message):
            Planner(layout).plan([span])


def test_the_last_page_and_the_last_place_are_inside():
    assert runs_of(SIMPLE, Span(0, 4, 3, [49])) == [(BASE + 4900, 300, 100)]


def test_addresses_are_64_bits_wide():
    far = 1 << 33
    layout = layout_of((BASE, (50, 100), (far, 1)))
    assert runs_of(layout, Span(1 << 45, 1, 0, [49])) == [(BASE + 49 * far, 1 << 45, 100)]
    assert Planner(layout).plan([Span(0, 1, 0, [1])]).engine.dtype == np.int64


# --- against a reference that looks at every byte


def bytes_of(runs):
    """Object byte to engine byte, for every byte of some runs."""
    pairs = [(stored + i, engine + i) for engine, stored, length in runs for i in range(length)]
    assert len(dict(pairs)) == len(pairs), "an object byte is copied twice"
    return dict(pairs)


def naive(layouts, page_axis, blocks, spans, chosen):
    """The same from first principles: the bytes of a page, sorted by address, one by one."""

    def page(base, shape, strides, number):
        axes = [range(n) for n in shape]
        axes[page_axis] = range(number * blocks, (number + 1) * blocks)
        return sorted(
            base + sum(i * s for i, s in zip(point, strides, strict=True))
            for point in product(*axes)
        )

    sizes = [len(page(*tensor, 0)) for tensor in layouts]
    step = layouts[0][2][page_axis] * blocks
    bases = [tensor[0] for tensor in layouts]
    same_step = all(tensor[2][page_axis] * blocks == step for tensor in layouts)
    by_page = len(layouts) > 1 and same_step and max(bases) - min(bases) < step
    expected = {}
    for span in spans:
        for index in chosen:
            for place, number in enumerate(span.pages, span.first):
                if by_page:
                    start = place * sum(sizes) + sum(sizes[:index])
                else:
                    start = span.object_pages * sum(sizes[:index]) + place * sizes[index]
                for i, address in enumerate(page(*layouts[index], number)):
                    expected[span.payload + start + i] = address
    return expected


@st.composite
def tensors(draw):
    """Some byte tensors of one engine: axes in any memory order, with gaps, in some parts."""
    rank = draw(st.integers(2, 4))
    page_axis = draw(st.integers(0, rank - 1))
    blocks = draw(st.sampled_from([1, 1, 2, 3]))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[page_axis] = blocks * draw(st.integers(1, 5))
    order = draw(st.permutations(range(rank)))
    strides, extent = [0] * rank, 1
    for axis in order:
        strides[axis] = extent + draw(st.sampled_from([0, 0, 0, 1, 5]))
        extent = strides[axis] * shape[axis]
    count = draw(st.integers(1, 3))
    if draw(st.booleans()):  # inside one another, page outermost
        strides[page_axis] = extent * count
        bases = [BASE + index * extent for index in range(count)]
    else:
        bases = [BASE + index * (extent + 7) for index in range(count)]
    return [(base, tuple(shape), tuple(strides)) for base in bases], page_axis, blocks


@given(tensors(), st.data())
def test_runs_are_right_and_fewest(made, data):
    parts, page_axis, blocks = made
    layout = layout_of(*parts, page_axis=page_axis, blocks=blocks)
    spans, payload = [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        object_pages = data.draw(st.integers(1, 4))
        first = data.draw(st.integers(0, object_pages - 1))
        pages = data.draw(
            st.lists(
                st.integers(0, layout.num_pages - 1), min_size=1, max_size=object_pages - first
            )
        )
        spans.append(Span(payload, object_pages, first, pages))
        payload += object_pages * layout.page_bytes + data.draw(st.sampled_from([0, 640]))
    region = data.draw(st.one_of(st.none(), st.integers(0, len(parts) - 1)))
    chosen = range(len(parts)) if region is None else [region]

    runs = runs_of(layout, *spans, region=region)
    assert bytes_of(runs) == naive(parts, page_axis, blocks, spans, chosen)
    assert Planner(layout).plan(spans, region).total_bytes == sum(length for _, _, length in runs)
    for (engine, stored, length), (next_engine, next_stored, _) in pairwise(runs):
        assert stored + length <= next_stored, "runs are in the order of the object"
        joined = engine + length == next_engine and stored + length == next_stored
        assert not joined, "two runs could be one"
