"""Every kernel copies exactly the bytes it should, for every engine's layout."""

from __future__ import annotations

import numpy as np
import pools
import pytest
import torch

from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.slab import Slab

CPU = torch.device("cpu")
POISON = 0xA5
PAGES = [7, 2, 3, 10, 0]
POOLS = pools.all_pools()


@pytest.fixture(params=POOLS, scope="module")
def pool(request):
    return POOLS[request.param]()


def object_buffer(size, shift):
    """Room for an object, `shift` bytes off from any alignment, with a margin."""
    memory = torch.full((size + shift + 64,), POISON, dtype=torch.uint8)
    return memory, memory[shift : shift + size]


@pytest.fixture(params=["paged", "runs"])
def copy(request, interpreted):
    """Copies spans with one kernel or the other; object addresses are absolute."""

    def paged(planner, spans, *, to_stored, programs):
        pages = planner.pages(spans)
        for shape in planner.shapes:
            kernel = interpreted.paged.PagedKernel(shape, CPU)
            kernel.launch(pages, to_stored=to_stored, programs=programs)

    def runs(planner, spans, *, to_stored, programs):
        found = planner.plan(spans)
        ends = (found.stored, found.engine) if to_stored else (found.engine, found.stored)
        interpreted.scattered.copy_runs(*ends, found.length, CPU, programs=programs)

    return {"paged": paged, "runs": runs}[request.param]


def test_pages_become_an_object_and_pages_again(pool, copy):
    there_and_back(pool, copy, shift=0)


@pytest.mark.parametrize("shift", [8, 4, 2, 1])
@pytest.mark.parametrize(
    "name",
    [
        "vllm-LBHNC-bfloat16-2-16-head_size16",
        "vllm-BHLNC-bfloat16-8-1-head_size16",
        "split-True-True-bfloat16-8-16",
        "mla-bfloat16-16-padding28",
        "sglang-float8_e4m3fn-2-1",
        "trtllm_by_layer-bfloat16",
    ],
)
def test_objects_may_begin_anywhere(copy, name, shift):
    there_and_back(POOLS[name](), copy, shift)


def there_and_back(pool, copy, shift):
    planner = Planner(pool.layout)
    expected = pool.object(PAGES)
    memory, stored = object_buffer(len(expected), shift)
    spans = [Span(stored.data_ptr(), len(PAGES), 0, PAGES)]
    before = pool.memory.clone()

    copy(planner, spans, to_stored=True, programs=3)
    assert torch.equal(stored, expected)
    assert (memory[:shift] == POISON).all()
    assert (memory[shift + len(expected) :] == POISON).all()
    assert torch.equal(pool.memory, before), "a store changes no page"

    pool.memory.fill_(POISON)
    copy(planner, spans, to_stored=False, programs=2)
    assert torch.equal(pool.object(PAGES), expected)
    others = [page for page in range(pools.PAGES) if page not in PAGES]
    assert (pool.object(others) == POISON).all()
    pool.fill()
    assert torch.equal(pool.memory, before)


FIVE_LAYERS = pools.vllm("LBHNC", torch.uint8, 2, 4, layers=5)


def test_many_objects_in_one_launch(copy):
    """Whole ones, the middle of one, one page twice; each object of its own size."""
    planner = Planner(FIVE_LAYERS.layout)
    page_bytes = FIVE_LAYERS.layout.page_bytes
    parts = [(4, 0, [1, 2, 3, 4]), (6, 2, [9, 0, 5]), (2, 1, [9]), (1, 0, [10])]
    memory, _ = object_buffer(16 * page_bytes, 0)
    spans, expected, at = [], torch.full_like(memory, POISON), 0
    for count, first, pages in parts:
        spans.append(Span(memory.data_ptr() + at, count, first, pages))
        whole = FIVE_LAYERS.object([0] * first + pages + [0] * (count - first - len(pages)))
        shares = whole.reshape(len(FIVE_LAYERS.tensors), count, -1)
        wanted = expected[at : at + len(whole)].reshape(shares.shape)
        wanted[:, first : first + len(pages)] = shares[:, first : first + len(pages)]
        at += len(whole)
    copy(planner, spans, to_stored=True, programs=5)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("chosen", [range(1), range(1, 4), range(4, 5), range(2, 2)])
def test_some_regions_only(interpreted, chosen):
    planner = Planner(FIVE_LAYERS.layout)
    expected = FIVE_LAYERS.object(PAGES).reshape(5, -1).clone()
    _, stored = object_buffer(expected.numel(), 0)
    pages = planner.pages([Span(stored.data_ptr(), len(PAGES), 0, PAGES)])
    kernel = interpreted.paged.PagedKernel(planner.shapes[0], CPU)
    kernel.launch(pages, to_stored=True, regions=chosen)
    for index in set(range(5)) - set(chosen):
        expected[index] = POISON
    assert torch.equal(stored, expected.reshape(-1))


@pytest.mark.parametrize("programs", [1, 2, 7, 1000])
def test_any_number_of_programs(copy, programs):
    planner = Planner(FIVE_LAYERS.layout)
    expected = FIVE_LAYERS.object(PAGES)
    _, stored = object_buffer(len(expected), 16)
    spans = [Span(stored.data_ptr(), len(PAGES), 0, PAGES)]
    copy(planner, spans, to_stored=True, programs=programs)
    assert torch.equal(stored, expected)


def test_nothing_to_copy(copy):
    planner = Planner(FIVE_LAYERS.layout)
    memory, stored = object_buffer(1024, 0)
    copy(planner, [Span(stored.data_ptr(), 3, 1, [])], to_stored=True, programs=2)
    copy(planner, [], to_stored=True, programs=2)
    assert (memory == POISON).all()


def test_offsets_beyond_two_to_the_31(copy):
    """Six gigabytes of which only a few pages are touched."""
    size, pages = 1 << 20, 6 << 10
    far = Slab.create(size * pages)
    pool = torch.frombuffer(far.view, dtype=torch.uint8).view(pages, size)[:, :4096]
    layout = PageLayout(
        (
            region_of(
                "far",
                pool.data_ptr(),
                pool.shape,
                pool.stride(),
                itemsize=1,
                dtype="uint8",
                page_axis=0,
            ),
        ),
        16,
        "far",
    )
    chosen = [pages - 1, 2049, 2048, 4097, 1]
    for page in chosen:
        pool[page] = torch.arange(4096).add(page).to(torch.uint8)
    expected = torch.cat([pool[page] for page in chosen])
    _, stored = object_buffer(len(expected), 0)
    spans = [Span(stored.data_ptr(), len(chosen), 0, chosen)]
    copy(Planner(layout), spans, to_stored=True, programs=4)
    assert torch.equal(stored, expected)
    for page in chosen:
        pool[page] = POISON
    copy(Planner(layout), spans, to_stored=False, programs=4)
    assert torch.equal(torch.cat([pool[page] for page in chosen]), expected)


@pytest.mark.parametrize(
    ("numbers", "word"),
    [([0], 16), ([16, 4096], 16), ([8, 16], 8), ([12], 4), ([1 << 40, 2], 2), ([7, 16], 1)],
)
def test_the_widest_word(interpreted, numbers, word):
    columns = [np.array([[number]], np.int64) for number in numbers]
    assert interpreted.words.word_of(*columns) == word


@pytest.mark.parametrize(("shift", "word"), [(0, 16), (8, 8), (4, 4), (6, 2), (1, 1)])
def test_no_word_is_wider_than_an_object_is_aligned(interpreted, monkeypatch, shift, word):
    """A GPU stops at an access that is not aligned; an interpreter on a CPU does not notice."""
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append(constants["WORD"])

    monkeypatch.setattr(interpreted.paged, "_paged_kernel", Kernel())
    planner = Planner(FIVE_LAYERS.layout)
    pages = planner.pages([Span((1 << 20) + shift, 3, 0, [1, 2, 3])])
    interpreted.paged.PagedKernel(planner.shapes[0], CPU).launch(pages, to_stored=True)
    assert seen == [word]
