"""Every layout an engine may have: what is stored of a page is that page; nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import rig
import torch

from lmcache.core.errors import LayoutError
from lmcache.core.geometry import Geometry
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.mover import Move, Mover
from lmcache.core.slab import CONTROL_BYTES, Slab

LAYERS, TOKENS, DIM = 2, 8, 16
PAD = 24
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32]


class Engine:
    """The KV tensors of an engine: `case` says how they lie in memory."""

    def __init__(self, case, *, heads=2, ratio=1, dtype=torch.float32, pages=10):
        self.like = {"heads": heads, "ratio": ratio, "dtype": dtype, "pages": pages}
        self.case = case
        self.ratio = ratio
        self.pages = pages
        self.dtype = dtype
        self.allocations = []
        self.tensors, self.axis = case(self.allocate, pages * ratio, TOKENS // ratio, heads)

    def allocate(self, *shape):
        integers = torch.zeros(shape, dtype=INTEGERS[self.dtype.itemsize])
        self.allocations.append(integers)
        return integers.view(self.dtype)

    def layout(self, **changes):
        regions = [
            region_of(
                f"layer.{index}",
                tensor.data_ptr(),
                tensor.shape,
                tensor.stride(),
                itemsize=tensor.element_size(),
                dtype=str(tensor.dtype),
                page_axis=self.axis,
                blocks_per_page=self.ratio,
            )
            for index, tensor in enumerate(self.tensors)
        ]
        return replace(PageLayout(tuple(regions), TOKENS, "test"), **changes)

    def page(self, layer, page):
        """What the engine itself calls page `page` of a layer, as integers."""
        tensor = self.tensors[layer].view(INTEGERS[self.dtype.itemsize])
        return tensor.narrow(self.axis, page * self.ratio, self.ratio)

    def number_elements(self, plane):
        """Write byte or word number `plane` of its own position at each element."""
        bits = 8 * self.dtype.itemsize
        start = 0
        for memory in self.allocations:
            positions = torch.arange(start, start + memory.numel()) >> (plane * bits)
            if bits == 8:
                positions &= 0xFF
            memory.copy_(positions.to(memory.dtype).view(memory.shape))
            start += memory.numel()

    def after(self, copies):
        """A copy of all memory as it must be after `copies`, page by page."""
        twin = Engine(self.case, **self.like)
        for memory, mine in zip(twin.allocations, self.allocations, strict=True):
            memory.copy_(mine)
        for layer in range(LAYERS):
            for source, target in copies:
                twin.page(layer, target).copy_(self.page(layer, source))
        return twin.allocations

    def holds(self, allocations):
        return all(map(torch.equal, self.allocations, allocations))

    @property
    def planes(self):
        """How many such words tell every two elements apart."""
        bits = sum(memory.numel() for memory in self.allocations).bit_length()
        return -(-bits // (8 * self.dtype.itemsize - (self.dtype.itemsize > 1)))


# --- how engines lay out their pages; `make(shape)` allocates, `n` counts blocks of `t` tokens


def nhd_split_page_second(make, n, t, h):
    return [make(2, n, t, h, DIM) for _ in range(LAYERS)], 1


def hnd_split_page_second(make, n, t, h):
    return [make(2, n, h, t, DIM).transpose(2, 3) for _ in range(LAYERS)], 1


def nhd_split_page_first(make, n, t, h):
    return [make(n, 2, t, h, DIM) for _ in range(LAYERS)], 0


def hnd_split_page_first(make, n, t, h):
    return [make(n, 2, h, t, DIM).transpose(2, 3) for _ in range(LAYERS)], 0


def nhd_packed(make, n, t, h):
    return [make(n, t, h, 2 * DIM) for _ in range(LAYERS)], 0


def hnd_packed(make, n, t, h):
    return [make(n, h, t, 2 * DIM).transpose(1, 2) for _ in range(LAYERS)], 0


def blhnc(make, n, t, h):
    blocks = make(n, LAYERS, h, t, 2 * DIM)
    return [blocks[:, layer].transpose(1, 2) for layer in range(LAYERS)], 0


def blnhc(make, n, t, h):
    blocks = make(n, LAYERS, t, h, 2 * DIM)
    return [blocks[:, layer] for layer in range(LAYERS)], 0


def block_outermost_split(make, n, t, h):
    blocks = make(n, LAYERS, 2, t, h, DIM)
    return [blocks[:, layer] for layer in range(LAYERS)], 0


def layer_outermost_split(make, n, t, h):
    layers = make(LAYERS, 2, n, t, h, DIM)
    return [layers[layer] for layer in range(LAYERS)], 1


def mla(make, n, t, h):
    return [make(n, t, 2 * DIM) for _ in range(LAYERS)], 0


def mla_block_outermost(make, n, t, h):
    blocks = make(n, LAYERS, t, 2 * DIM)
    return [blocks[:, layer] for layer in range(LAYERS)], 0


def padded_pages(make, n, t, h):
    size = t * h * 2 * DIM
    blocks = [make(n, size + PAD) for _ in range(LAYERS)]
    return [b[:, :size].unflatten(1, (t, h, 2 * DIM)) for b in blocks], 0


def padded_pages_split(make, n, t, h):
    size = t * h * DIM
    blocks = [make(2, n, size + PAD) for _ in range(LAYERS)]
    return [b[:, :, :size].unflatten(2, (t, h, DIM)) for b in blocks], 1


def padded_tokens(make, n, t, h):
    return [make(n, t, h, 2 * DIM + 8)[..., : 2 * DIM] for _ in range(LAYERS)], 0


def padded_block_outermost(make, n, t, h):
    size = t * h * 2 * DIM
    blocks = make(n, LAYERS * size + PAD)
    parts = [blocks[:, layer * size : (layer + 1) * size] for layer in range(LAYERS)]
    return [part.unflatten(1, (t, h, 2 * DIM)) for part in parts], 0


SPLIT = [
    nhd_split_page_second,
    hnd_split_page_second,
    nhd_split_page_first,
    hnd_split_page_first,
    block_outermost_split,
    layer_outermost_split,
    padded_pages_split,
]
PACKED = [nhd_packed, hnd_packed, blhnc, blnhc, padded_pages, padded_tokens, padded_block_outermost]
LATENT = [mla, mla_block_outermost]

every_case = pytest.mark.parametrize("case", [*SPLIT, *PACKED, *LATENT], ids=lambda c: c.__name__)
every_heads = pytest.mark.parametrize("heads", [1, 2, 8], ids="h{}".format)
every_ratio = pytest.mark.parametrize("ratio", [1, 2, 4], ids="x{}".format)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Copies:
    """A slab with room for one object, and a mover of an engine's pages."""

    def __init__(self, layout, object_pages, threads=1):
        self.layout = layout
        self.object_pages = object_pages
        self.geometry = Geometry(layout.page_tokens, object_pages, (layout.page_bytes,), bytes(32))
        self.size = self.geometry.slot_bytes(object_pages)
        self.slab = Slab.create(CONTROL_BYTES + self.size + 512)
        self.slab.view[:] = bytes([rig.POISON]) * self.slab.size
        self.mover = Mover(layout, self.geometry, self.slab, threads=threads)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.mover.close()

    def move(self, pages, first=0):
        return Move(CONTROL_BYTES, 1, self.object_pages, first, list(pages))

    def by_region(self, act, moves, *, one_by_one):
        for region in range(len(self.layout.regions)) if one_by_one else [None]:
            act(moves, region)

    def store(self, pages, *, one_by_one=False):
        moves = [self.move(pages)]
        self.by_region(self.mover.store, moves, one_by_one=one_by_one)
        self.mover.publish(moves)

    def load(self, pages, first=0, *, one_by_one=False):
        def load(moves, region):
            _, failed = self.mover.load(moves, region)
            assert not failed

        self.by_region(load, [self.move(pages, first)], one_by_one=one_by_one)

    @property
    def payload(self):
        start = CONTROL_BYTES + self.geometry.payload_offset(0, self.object_pages)
        return self.slab.view[start : start + self.object_pages * self.layout.page_bytes]

    def surroundings(self):
        """What lies before and after the slot's payload."""
        start = CONTROL_BYTES + self.geometry.payload_offset(0, self.object_pages)
        end = start + self.object_pages * self.layout.page_bytes
        return bytes(self.slab.view[:start]), bytes(self.slab.view[end:])


@every_case
@every_heads
@every_ratio
@every_dtype
def test_a_page_goes_to_another_page_and_nowhere_else(case, heads, ratio, dtype):
    engine = Engine(case, heads=heads, ratio=ratio, dtype=dtype)
    source, target = [5, 0, 8, 3], [1, 9, 2, 6]
    with Copies(engine.layout(), len(source)) as copies:
        for plane in range(engine.planes):
            engine.number_elements(plane)
            before = engine.after([])
            expected = engine.after(list(zip(source, target, strict=True)))
            around = copies.surroundings()
            copies.store(source, one_by_one=plane % 2 == 1)
            assert engine.holds(before), "a store changed the engine's memory"
            if plane:  # the first one publishes
                assert copies.surroundings() == around, "a store left its slot"
            copies.load(target, one_by_one=plane % 2 == 0)
            assert engine.holds(expected)


@every_case
@every_ratio
def test_part_of_an_object_can_be_loaded(case, ratio):
    engine = Engine(case, ratio=ratio, dtype=torch.bfloat16)
    with Copies(engine.layout(), 4) as copies:
        engine.number_elements(0)
        expected = engine.after([(1, 7), (2, 5)])
        copies.store([0, 1, 2, 3])
        copies.load([7, 5], first=1)
        assert engine.holds(expected)


def object_of(case, *, heads, ratio, pages, table):
    """The layout of an engine, and the bytes of an object, for the same logical content."""
    engine = Engine(case, heads=heads, ratio=ratio, pages=pages)
    generator = torch.Generator().manual_seed(heads)
    for layer in range(LAYERS):
        for page in table:
            # random numbers by token, not by block, so that the ratio does not count
            if case in SPLIT:
                value = torch.randn(2, TOKENS, heads, DIM, generator=generator)
                value = value.unflatten(1, (ratio, TOKENS // ratio))
                value = value.movedim(1, engine.axis)
            else:
                shape = (TOKENS, 2 * DIM) if case in LATENT else (TOKENS, heads, 2 * DIM)
                value = torch.randn(shape, generator=generator)
                value = value.unflatten(0, (ratio, TOKENS // ratio))
            narrow = engine.tensors[layer].narrow(engine.axis, page * ratio, ratio)
            narrow.copy_(value)
    layout = engine.layout()
    with Copies(layout, len(table)) as copies:
        copies.store(table)
        return layout, bytes(copies.payload)


@pytest.mark.parametrize("group", [SPLIT, PACKED, LATENT], ids=["split", "packed", "latent"])
@every_heads
@every_ratio
def test_fingerprints_are_equal_exactly_if_bytes_mean_the_same(group, heads, ratio):
    """For engines whose tensors have one logical shape: padding and page count do not matter."""
    made = {}
    for case in group:
        for pages, table in ((6, [1, 4]), (11, [10, 0])):
            name = f"{case.__name__}/{pages}"
            made[name] = object_of(case, heads=heads, ratio=ratio, pages=pages, table=table)
    for one, other in combinations(made, 2):
        (layout, data), (other_layout, other_data) = made[one], made[other]
        same = layout.fingerprint == other_layout.fingerprint
        assert same is (data == other_data), f"{one} and {other}"


@every_case
def test_the_number_of_pages_is_no_part_of_the_fingerprint(case):
    """An engine that finds more memory after a restart still finds what it stored."""
    assert Engine(case, pages=6).layout().fingerprint == Engine(case, pages=11).layout().fingerprint


def test_heads_and_tokens_are_told_apart():
    nhd, hnd = Engine(nhd_split_page_first), Engine(hnd_split_page_first)
    assert [t.shape for t in nhd.tensors] == [t.shape for t in hnd.tensors]
    assert nhd.layout().fingerprint != hnd.layout().fingerprint


def test_with_one_head_there_is_nothing_to_tell_apart():
    nhd, hnd = Engine(nhd_split_page_first, heads=1), Engine(hnd_split_page_first, heads=1)
    assert nhd.layout().fingerprint == hnd.layout().fingerprint


@every_ratio
def test_kernel_blocks_count(ratio):
    one, other = Engine(nhd_split_page_second), Engine(nhd_split_page_second, ratio=ratio)
    assert (one.layout().fingerprint == other.layout().fingerprint) is (ratio == 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.layout(kind="other"),
        lambda e: e.layout(page_tokens=TOKENS * 2),
        lambda e: e.layout(regions=e.layout().regions[:1]),
        lambda e: e.layout(regions=e.layout().regions + e.layout().regions[:1]),
        lambda e: Engine(nhd_packed, dtype=torch.int32).layout(),
        lambda e: Engine(nhd_packed, dtype=torch.bfloat16).layout(),
        lambda e: Engine(nhd_packed, heads=4).layout(),
        lambda e: Engine(nhd_split_page_first).layout(),
        lambda e: Engine(blnhc).layout(),
    ],
    ids=[
        "kind",
        "tokens",
        "fewer layers",
        "more layers",
        "type",
        "width",
        "heads",
        "split",
        "page outermost",
    ],
)
def test_a_difference_shows_in_the_fingerprint(change):
    engine = Engine(nhd_packed, dtype=torch.float32)
    assert change(engine).fingerprint != engine.layout().fingerprint


def test_the_layers_names_and_places_are_no_part_of_the_fingerprint():
    engine = Engine(nhd_packed)
    regions = [replace(r, name=f"other.{r.name}") for r in engine.layout().regions]
    assert engine.layout(regions=tuple(regions)).fingerprint == engine.layout().fingerprint
    assert Engine(nhd_packed).layout().fingerprint == engine.layout().fingerprint


@every_case
@every_ratio
def test_sizes(case, ratio):
    engine = Engine(case, heads=8, ratio=ratio, dtype=torch.bfloat16)
    layout = engine.layout()
    assert layout.num_pages == engine.pages
    assert layout.page_bytes == 2 * sum(engine.page(layer, 0).numel() for layer in range(LAYERS))
    for region in layout.regions:
        assert len(region.run_offsets) * region.run_bytes == region.page_bytes


@pytest.mark.parametrize(
    ("case", "page_major", "runs"),
    [
        (nhd_split_page_second, False, 12),
        (hnd_split_page_second, False, 12),
        (nhd_split_page_first, False, 2),
        (nhd_packed, False, 2),
        (mla, False, 2),
        (blhnc, True, 1),
        (blnhc, True, 1),
        (block_outermost_split, True, 1),
        (mla_block_outermost, True, 1),
        (layer_outermost_split, False, 12),
        (padded_pages, False, 6),
        (padded_block_outermost, True, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@every_heads
def test_neighbouring_pages_are_copied_in_few_runs(case, page_major, runs, heads):
    """Three pages in a row: as many runs as the engine's memory has gaps, whatever the heads."""
    layout = Engine(case, heads=heads).layout()
    assert layout.page_major is page_major
    assert len(Planner(layout).plan([Span(0, 3, 0, [4, 5, 6])]).length) == runs


def region(shape, strides, **options):
    chosen = {"itemsize": 2, "dtype": "d", "page_axis": 0, **options}
    return region_of("layer.7", 4096, shape, strides, **chosen)


@pytest.mark.parametrize(
    ("shape", "strides", "options"),
    [
        ((8, 4, 16), (0, 16, 1), {}),
        ((8, 4, 16), (-64, 16, 1), {}),
        ((8, 4, 16), (64, 0, 1), {}),
        ((8, 4, 16), (64, -16, 1), {}),
        ((8, 4, 16), (64, 16, 0), {}),
        ((8, 4, 16), (64, 8, 1), {}),
        ((8, 4, 16), (32, 16, 1), {}),
        ((8, 4, 16), (1, 16, 1), {}),
        ((2, 8, 16), (64, 16, 1), {"page_axis": 1}),
        ((8, 4, 16), (64, 16, 1), {"blocks_per_page": 3}),
        ((8, 4, 16), (32, 16, 1), {"blocks_per_page": 2}),
        ((8, 0, 16), (64, 16, 1), {}),
        ((0, 4, 16), (64, 16, 1), {}),
    ],
    ids=[
        "all pages are one",
        "pages run backwards",
        "an expanded axis",
        "a reversed axis",
        "elements repeat",
        "rows overlap",
        "pages overlap",
        "pages inside rows",
        "pages overlap the halves",
        "blocks do not divide",
        "blocks overlap",
        "an empty axis",
        "no pages",
    ],
)
def test_what_cannot_be_copied_safely_is_refused(shape, strides, options):
    with pytest.raises(LayoutError, match="^layer.7: "):
        region(shape, strides, **options)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((8, 1, 16), (16, 0, 1)), ((8, 4, 1), (4, 1, 0)), ((1, 4, 16), (1, 16, 1))],
    ids=["an axis of one", "elements of one", "one page"],
)
def test_the_stride_of_an_axis_of_one_does_not_matter(shape, strides):
    assert region(shape, strides).page_bytes == 2 * shape[1] * shape[2]


def test_a_layout_needs_regions_of_equally_many_pages():
    with pytest.raises(LayoutError, match="at least one"):
        PageLayout((), 16, "test")
    with pytest.raises(LayoutError, match="number of pages"):
        PageLayout((region((8, 16), (16, 1)), region((9, 16), (16, 1))), 16, "test")


def test_pages_beyond_two_to_the_31():
    """Nothing between the page id and the address is 32 bits wide."""
    stride, pages = 3 << 29, 5
    memory = Slab.create(stride * pages)  # only what is touched is there
    array = np.frombuffer(memory.view, np.uint8)
    rows = np.lib.stride_tricks.as_strided(array, (pages, 64), (stride, 1))
    described = region_of(
        "far",
        array.ctypes.data,
        rows.shape,
        rows.strides,
        itemsize=1,
        dtype="uint8",
        page_axis=0,
    )
    with Copies(PageLayout((described,), 16, "test"), 1) as copies:
        rows[4] = np.arange(64)
        copies.store([4])
        copies.load([3])
        assert (rows[3] == np.arange(64)).all()
        assert not rows[:3].any()
    del rows, array
    memory.close()
