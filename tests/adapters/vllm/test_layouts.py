"""Each KV tensor that vLLM 0.22 to 0.33 registers is read as what it is; others are refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

PAGES, TOKENS, SIZE = 6, 4, 8
HEADS = [1, 2, 8]

ATTENTION_0_22 = {
    # logical shapes, and which axis counts blocks
    "FLASH_ATTN": (lambda b, n, h, d: (2, b, n, h, d), 1),
    "CPU_ATTN": (lambda b, n, h, d: (2, b, h, n, d), 1),
    "TRITON_ATTN": (lambda b, n, h, d: (b, 2, n, h, d), 0),
    "FLASHINFER": (lambda b, n, h, d: (b, 2, n, h, d), 0),
}
MLA_3D = (lambda b, n, h, d: (b, n, d), 0)
SPLIT = (lambda b, n, h, d: (b, 2, n, h, d), 0)
PACKED = (lambda b, n, h, d: (b, h, n, 2 * d), 0)
MLA_4D = (lambda b, n, h, d: (b, 1, n, d), 0)


def shapes():
    """Version, backend, shape and block axis of every kind of tensor."""
    for backend, shape in ATTENTION_0_22.items():
        yield "0.22.1", backend, *shape
    yield "0.22.1", "TRITON_MLA", *MLA_3D
    for version in ("0.23.0", "0.24.0", "0.25.1"):
        for backend in ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"):
            yield version, backend, *SPLIT
        yield version, "CPU_ATTN", *PACKED
        yield version, "FLASHMLA", *MLA_3D
    for version in ("0.26.0", "0.27.1", "0.28.0"):
        for backend in ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "CPU_ATTN"):
            yield version, backend, *PACKED
        yield version, "FLASHMLA", *MLA_3D
    for version in ("0.29.0", "0.30.0", "0.31.0", "0.32.0+cpu", "0.33.0"):
        for backend in ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "CPU_ATTN"):
            yield version, backend, *PACKED
        yield version, "FLASHMLA", *MLA_4D


CASES = [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in shapes()]


@dataclass
class FullAttentionSpec:
    """vLLM's spec of this name, as far as a layout needs it."""

    block_size: int = TOKENS


@dataclass
class MLAAttentionSpec(FullAttentionSpec): ...


@dataclass
class SlidingWindowSpec(FullAttentionSpec):
    sliding_window: int = 8


@dataclass
class ChunkedLocalAttentionSpec(FullAttentionSpec): ...


@dataclass
class UniformTypeKVCacheSpecs(FullAttentionSpec):
    kv_cache_specs: ClassVar[dict] = {}


def cache_config(pages=PAGES, spec=None, groups=1):
    return grouped(*[(spec or FullAttentionSpec(), [])] * groups, pages=pages)


def grouped(*groups, pages=PAGES):
    """vLLM's account of cache groups: a spec and the names of layers for each."""
    made = [SimpleNamespace(kv_cache_spec=spec, layer_names=names) for spec, names in groups]
    return SimpleNamespace(num_blocks=pages, kv_cache_groups=made)


@pytest.fixture
def layout_of(rig):
    from lmcache.adapters.vllm.groups import groups_of
    from lmcache.adapters.vllm.translate import layout_of

    def call(kv_caches, backend, version, config=None):
        backends = dict.fromkeys(kv_caches, backend)
        config = config or cache_config()
        return layout_of(kv_caches, backends, config, groups_of(config), version)

    return call


def in_order(shape, order, dtype=torch.bfloat16):
    """A tensor of a logical shape whose axes lie in memory in another order."""
    physical = torch.zeros([shape[axis] for axis in order], dtype=dtype)
    return physical.permute([order.index(axis) for axis in range(len(shape))])


def addresses(tensor):
    """The address of every byte of a tensor."""
    size = tensor.element_size()
    starts = [0]
    for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
        starts = [start + i * stride * size for start in starts for i in range(count)]
    return sorted(tensor.data_ptr() + start + byte for start in starts for byte in range(size))


def addresses_of_page(region, page):
    """The same for a page of a region, from what the layout says alone."""
    start = region.base + page * region.page_stride
    return sorted(
        start + offset + byte for offset in region.run_offsets for byte in range(region.run_bytes)
    )


def assert_pages_are_right(layout, tensors, axis, ratio=1):
    assert layout.num_pages == PAGES
    for region, tensor in zip(layout.regions, tensors, strict=True):
        for page in range(PAGES):
            blocks = tensor.narrow(axis, page * ratio, ratio)
            assert addresses_of_page(region, page) == addresses(blocks)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("version", "backend", "shape", "axis"), CASES)
def test_a_page_is_what_the_engine_says(layout_of, version, backend, shape, axis, heads):
    tensors = {name: torch.zeros(shape(PAGES, TOKENS, heads, SIZE)) for name in ("0", "1")}
    layout = layout_of(tensors, backend, version)
    assert layout.page_tokens == TOKENS
    assert_pages_are_right(layout, tensors.values(), axis)


@pytest.mark.parametrize(("version", "backend", "shape", "axis"), CASES)
def test_whatever_the_order_in_memory(layout_of, version, backend, shape, axis):
    logical = shape(PAGES, TOKENS, 2, SIZE)
    seen = set()
    for order in itertools.permutations(range(len(logical))):
        if order[-1] != len(logical) - 1:
            continue  # elements of a head are always adjacent
        tensor = in_order(logical, order)
        layout = layout_of({"0": tensor}, backend, version)
        assert_pages_are_right(layout, [tensor], axis)
        seen.add(layout.fingerprint)
    assert len(seen) > 1 or logical[1] == 1 or len(logical) == 3


@pytest.mark.parametrize(("version", "backend", "shape", "axis"), CASES)
def test_as_many_pages_as_heads_or_halves_confuse_nothing(layout_of, version, backend, shape, axis):
    for pages in (2, 8):
        tensor = torch.zeros(shape(pages, TOKENS, 2, SIZE))
        layout = layout_of({"0": tensor}, backend, version, cache_config(pages))
        [region] = layout.regions
        for page in range(pages):
            assert addresses_of_page(region, page) == addresses(tensor.narrow(axis, page, 1))


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize(("version", "backend", "shape", "axis"), CASES)
def test_pages_of_several_kernel_blocks(layout_of, version, backend, shape, axis, ratio):
    tensor = torch.zeros(shape(PAGES * ratio, TOKENS // ratio, 2, SIZE))
    layout = layout_of({"0": tensor}, backend, version)
    assert_pages_are_right(layout, [tensor], axis, ratio)
    whole = torch.zeros(shape(PAGES, TOKENS, 2, SIZE))
    assert layout.fingerprint != layout_of({"0": whole}, backend, version).fingerprint


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
@pytest.mark.parametrize("heads", HEADS)
def test_layers_that_are_views_of_one_allocation(layout_of, order, heads):
    sizes = {"L": 3, "B": PAGES, "H": heads, "N": TOKENS, "C": 2 * SIZE}
    backing = torch.zeros([sizes[axis] for axis in order], dtype=torch.bfloat16)
    views = backing.permute([order.index(axis) for axis in "LBHNC"])
    tensors = {str(i): view for i, view in enumerate(views)}
    layout = layout_of(tensors, "FLASH_ATTN", "0.32.0")
    assert_pages_are_right(layout, tensors.values(), 0)
    # one read fetches a whole page where a page's layers lie together
    assert layout.page_major == (order[0] == "B")


def test_dtypes_are_bytes_with_a_name(layout_of):
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn):
        tensor = torch.zeros((PAGES, 2, TOKENS, SIZE), dtype=dtype)
        layout = layout_of({"0": tensor}, "FLASH_ATTN", "0.32.0")
        assert layout.page_bytes == 2 * TOKENS * SIZE * dtype.itemsize
        found[layout.fingerprint] = dtype
    assert len(found) == 4


# --- several layers


def test_layers_that_share_memory_are_one_region(layout_of, rig):
    from lmcache.adapters.vllm.translate import distinct

    one, other = (torch.zeros((PAGES, 2, TOKENS, SIZE)) for _ in range(2))
    shared = {"0": one, "1": other, "2": one, "3": one.view(one.shape)}
    layout = layout_of(shared, "FLASH_ATTN", "0.32.0")
    assert len(layout.regions) == 2
    tensors, places = distinct(shared)
    assert list(tensors) == ["0", "1"]
    assert places == {"0": 0, "1": 1, "2": 0, "3": 0}
    plain = layout_of({"0": one, "1": other}, "FLASH_ATTN", "0.32.0")
    assert layout.fingerprint == plain.fingerprint


def test_draft_layers_may_have_another_shape(layout_of):
    tensors = {
        "model": torch.zeros((PAGES, 8, TOKENS, 2 * SIZE)),
        "draft": torch.zeros((PAGES, 1, TOKENS, 6)),
        "indexer": torch.zeros((PAGES, 1, TOKENS, 5), dtype=torch.uint8),
    }
    layout = layout_of(tensors, "FLASH_ATTN", "0.32.0")
    assert_pages_are_right(layout, tensors.values(), 0)
    assert len({region.page_bytes for region in layout.regions}) == 3
    without = layout_of({"model": tensors["model"]}, "FLASH_ATTN", "0.32.0")
    assert layout.fingerprint != without.fingerprint


def test_names_of_layers_do_not_matter_and_their_order_does(layout_of):
    one = torch.zeros((PAGES, 2, TOKENS, SIZE))
    other = torch.zeros((PAGES, 4, TOKENS, SIZE))

    def fingerprint(**tensors):
        return layout_of(tensors, "FLASH_ATTN", "0.32.0").fingerprint

    assert fingerprint(a=one, b=other) == fingerprint(c=one, d=other)
    assert fingerprint(a=one, b=other) != fingerprint(a=other, b=one)


# --- what pages mean


def test_backends_and_versions_of_the_cpu_do_not_share(layout_of):
    tensor = torch.zeros((PAGES, 2, TOKENS, SIZE))
    plans = itertools.product(["CPU_ATTN", "TRITON_ATTN"], ["0.31.0", "0.32.0"])
    found = {layout_of({"0": tensor}, *plan).fingerprint for plan in plans}
    assert len(found) == 4
    same = {layout_of({"0": tensor}, "CPU_ATTN", v).fingerprint for v in ("0.32.0", "0.32.1+cpu")}
    assert len(same) == 1


def test_page_sizes_do_not_share(layout_of):
    tensor = torch.zeros((PAGES, 2, TOKENS, SIZE))
    found = set()
    for size in (TOKENS, 2 * TOKENS):
        config = cache_config(spec=FullAttentionSpec(size))
        found.add(layout_of({"0": tensor}, "FLASH_ATTN", "0.32.0", config).fingerprint)
    assert len(found) == 2


def test_groups_share_only_with_groups_like_them(layout_of):
    """Those that look equally far, and whose layers lie in the same places."""
    tensors = {name: torch.zeros((PAGES, 2, TOKENS, SIZE)) for name in "ab"}
    kv_caches = {"0": tensors["a"], "1": tensors["b"], "2": tensors["a"], "3": tensors["b"]}
    whole, near, far = FullAttentionSpec(), SlidingWindowSpec(), SlidingWindowSpec(sliding_window=9)
    plans = [
        [(whole, ["0", "1"]), (near, ["2", "3"])],
        [(whole, ["0", "1"]), (far, ["2", "3"])],
        [(near, ["0", "1"]), (whole, ["2", "3"])],
        [(whole, ["0", "3"]), (near, ["2", "1"])],
        [(whole, ["0", "1", "2", "3"])],
        [(near, ["0", "1", "2", "3"])],
        [(whole, ["0", "1"]), (whole, ["2", "3"])],
    ]
    layouts = [layout_of(kv_caches, "FLASH_ATTN", "0.32.0", grouped(*plan)) for plan in plans]
    assert len({layout.fingerprint for layout in layouts}) == len(plans)
    assert [layout.groups for layout in layouts] == [2, 2, 2, 2, 1, 1, 2]
    page = 2 * 2 * TOKENS * SIZE * 4
    assert [layout.stored_bytes for layout in layouts] == [2 * page] * 4 + [page] * 2 + [2 * page]


# --- refusals


@pytest.fixture
def refused(rig):
    from lmcache.core.errors import LayoutError

    def match(text):
        return pytest.raises(LayoutError, match=text)

    return match


TENSOR = {"layer.0": torch.zeros((PAGES, 2, TOKENS, SIZE))}


@pytest.mark.parametrize("version", ["0.21.0", "0.11.2", "0.34.0", "1.0.0", "0.100"])
def test_versions_nobody_checked_are_refused(layout_of, refused, version):
    with refused(r"vLLM \d+\.\d+ has KV layouts this release does not know; known: 0.22 to 0.33"):
        layout_of(TENSOR, "FLASH_ATTN", version)


@pytest.mark.parametrize("version", ["", "dev", "v"])
def test_versions_that_are_none_are_refused(layout_of, refused, version):
    with refused("is not understood"):
        layout_of(TENSOR, "FLASH_ATTN", version)


def test_backends_nobody_checked_are_refused(layout_of, refused):
    tensor = torch.zeros((PAGES, 2, TOKENS, 2, SIZE))
    with refused("attention backend ROCM_ATTN of vLLM 0.22"):
        layout_of({"0": tensor}, "ROCM_ATTN", "0.22.0")


@pytest.mark.parametrize("version", ["0.23.0", "0.28.0", "0.32.0"])
def test_tensors_whose_first_axis_counts_something_else_are_refused(layout_of, refused, version):
    tensor = torch.zeros((2, PAGES, TOKENS, 2, SIZE))
    with refused(r"layer.0: axis 0 of \(2, 6, 4, 2, 8\) does not count 6 blocks"):
        layout_of({"layer.0": tensor}, "ROCM_ATTN", version)


def test_no_cache_group_is_refused(layout_of, refused):
    with refused(r"pages of \[\] tokens"):
        layout_of(TENSOR, "FLASH_ATTN", "0.32.0", cache_config(groups=0))


def test_cache_groups_with_pages_of_several_sizes_are_refused(layout_of, refused):
    config = grouped((FullAttentionSpec(), []), (FullAttentionSpec(2 * TOKENS), []))
    with refused(rf"pages of \[{TOKENS}, {2 * TOKENS}\] tokens"):
        layout_of(TENSOR, "FLASH_ATTN", "0.32.0", config)


def test_a_group_that_looks_back_differently_far_is_refused(layout_of, refused):
    for other in (FullAttentionSpec(), SlidingWindowSpec(sliding_window=9)):
        spec = uniform(SlidingWindowSpec(sliding_window=8), other)
        with refused("look back differently far"):
            layout_of(TENSOR, "FLASH_ATTN", "0.32.0", cache_config(spec=spec))


def test_layers_that_disagree_on_their_pages_are_refused(layout_of, refused):
    tensors = {**TENSOR, "layer.1": torch.zeros((PAGES + 1, 2, TOKENS, SIZE))}
    with refused("layer.1"):
        layout_of(tensors, "FLASH_ATTN", "0.32.0")


def test_an_engine_without_pages_is_refused(layout_of, refused):
    with refused("at least one region"):
        layout_of({}, "FLASH_ATTN", "0.32.0")


def test_repeated_memory_is_refused(layout_of, refused):
    tensor = torch.zeros((1, 2, TOKENS, SIZE)).expand(PAGES, 2, TOKENS, SIZE)
    with refused("repeat or reverse"):
        layout_of({"0": tensor}, "FLASH_ATTN", "0.32.0")


def test_caches_that_forget_pages_are_refused(layout_of, refused):
    local = ChunkedLocalAttentionSpec()
    for spec in (local, uniform(FullAttentionSpec(), local)):
        with refused("ChunkedLocalAttentionSpec does not keep the pages"):
            layout_of(TENSOR, "FLASH_ATTN", "0.32.0", cache_config(spec=spec))
    for spec in (MLAAttentionSpec(), uniform(FullAttentionSpec(), MLAAttentionSpec())):
        assert layout_of(TENSOR, "FLASH_ATTN", "0.32.0", cache_config(spec=spec))


def uniform(*members):
    spec = UniformTypeKVCacheSpecs()
    spec.kv_cache_specs = dict(enumerate(members))
    return spec


def test_vllms_own_specs(layout_of, refused, rig):
    from vllm.v1 import kv_cache_interface as specs

    plain = {"block_size": 4, "num_kv_heads": 2, "head_size": 4, "dtype": torch.bfloat16}
    kept = [specs.FullAttentionSpec(**plain), specs.MLAAttentionSpec(**plain)]
    kept.append(specs.UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs={"a": kept[0]}))
    for spec in kept:
        assert layout_of(TENSOR, "FLASH_ATTN", "0.32.0", cache_config(spec=spec)).page_tokens == 4
    others = [
        specs.ChunkedLocalAttentionSpec(**plain, attention_chunk_size=8),
        specs.RSWASpec(**plain, rswa_window=8),
        specs.SlidingWindowMLASpec(**plain, sliding_window=8),
    ]
    for spec in others:
        with refused(f"{type(spec).__name__} does not keep"):
            layout_of(TENSOR, "FLASH_ATTN", "0.32.0", cache_config(spec=spec))


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused(rig, base_config, refused, name):
    import copy

    from lmcache.adapters.vllm.translate import check_parallel

    config = copy.copy(base_config)
    check_parallel(config)
    config.parallel_config = copy.copy(base_config.parallel_config)
    setattr(config.parallel_config, name, 2)
    with refused(f"{name} is 2"):
        check_parallel(config)


def test_an_engine_of_context_parallel_ranks_goes_without_a_cache(make_engine, lines):
    engine = make_engine(with_workers=False)
    engine.config.parallel_config.decode_context_parallel_size = 2
    engine.start_workers()
    assert len(lines.about("LMCache is off for this engine")) == 1


# --- slices


@pytest.mark.parametrize(
    ("mla", "tensor", "pipeline", "slices"),
    [
        (False, 1, 1, [0]),
        (False, 2, 1, [0, 1]),
        (False, 2, 2, [0, 1, 2, 3]),
        (True, 1, 1, [0]),
        (True, 4, 1, [0, 0, 0, 0]),
        (True, 2, 2, [0, 0, 1, 1]),
    ],
)
def test_ranks_with_the_same_bytes_have_one_slice(rig, mla, tensor, pipeline, slices):
    from lmcache.adapters.vllm.translate import slice_of

    def config(rank):
        return SimpleNamespace(
            parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=tensor),
            model_config=SimpleNamespace(use_mla=mla),
        )

    assert [slice_of(config(rank)) for rank in range(tensor * pipeline)] == slices
