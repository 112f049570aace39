"""What the core costs without an engine: copies, lookups, index and eviction.

Every speed is a ratio to something measured in the same run on the same bytes.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from lmcache.core.chain import KeyChain
from lmcache.core.decider import Decider
from lmcache.core.engine import CacheEngine, moves_for
from lmcache.core.geometry import Geometry
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.keys import ChunkKey, Identity, Namespace, root_key
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.slab import CONTROL_BYTES, Slab
from lmcache.core.tiers import Tiers
from lmcache.plugins.manager import PluginManager

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACE = Namespace(model="benchmark", dtype="bfloat16", layout="")


def _best(call: Callable[[], object], rounds: int = 9) -> float:
    """Median seconds of a call, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _engine(policy: str, size: int, layers: int, shape: tuple[int, ...]) -> CacheEngine:
    tensors = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(layers)]
    regions = [
        region_of(
            f"layer {i}",
            tensor.data_ptr(),
            tensor.shape,
            tensor.stride(),
            itemsize=tensor.element_size(),
            dtype=str(tensor.dtype),
            page_axis=0,
        )
        for i, tensor in enumerate(tensors)
    ]
    layout = PageLayout(tuple(regions), shape[2], "benchmark")
    decider = Decider(Slab.create(size), PluginManager().create_policy(policy, size))
    engine = CacheEngine(layout, NAMESPACE, decider, Tiers(decider, []))
    engine.tensors = tensors  # type: ignore[attr-defined]
    return engine


def copies() -> dict[str, Any]:
    """Store and retrieve of 2k tokens against memcpy of the same bytes, vLLM's CPU layout."""
    pages_of_prompt, pool = 16, 64
    engine = _engine("LRU", 2 << 30, 30, (pool, 3, 128, 128))
    tokens = list(range(pages_of_prompt * 128))
    pages = random.Random(0).sample(range(pool), pages_of_prompt)
    mover = engine._mover
    chain = engine.chain(tokens)
    slots, _ = engine.decider.reserve(chain, engine.geometry, 0, len(tokens), tail=True)
    moves = moves_for(slots, engine.geometry, pages, 0, pages_of_prompt)
    size = mover.store(moves)
    mover.publish(moves)

    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.ones(size, dtype=torch.uint8)
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    memcpy.restype = ctypes.c_void_p

    plain = _best(lambda: memcpy(target.data_ptr(), source.data_ptr(), size))
    store = _best(lambda: mover.store(moves))
    load = _best(lambda: mover.load(moves))
    return {
        "bytes": size,
        "memcpy_gb_s": size / plain / 1e9,
        "store_gb_s": size / store / 1e9,
        "load_gb_s": size / load / 1e9,
        "store_ratio": plain / store,
        "load_ratio": plain / load,
    }


def plans() -> dict[str, Any]:
    """Planning about 100,000 runs, in milliseconds, and per run in microseconds."""
    rng = random.Random(0)
    slot = 64 << 20
    pools = {  # pages, tokens in each, tensors, shape and strides of one in elements, chunks
        "token pools": (100_000, 1, 64, (100_000, 8, 128), (1024, 128, 1), 6),
        "K and V together": (20_000, 16, 32, (20_000, 16, 8, 256), (32768, 2048, 256, 1), 196),
        "K and V apart": (
            *(20_000, 16, 32, (2, 20_000, 16, 8, 128)),
            *((20_000 * 16384, 16384, 1024, 128, 1), 98),
        ),
    }
    rows = {}
    for name, (pages, tokens, tensors, shape, strides, chunks) in pools.items():
        regions = [
            region_of(
                f"{name} {index}",
                (1 << 44) + (index << 36),
                shape,
                strides,
                itemsize=2,
                dtype="bfloat16",
                page_axis=len(shape) - 4 if len(shape) > 4 else 0,
            )
            for index in range(tensors)
        ]
        planner = Planner(PageLayout(tuple(regions), tokens, name))
        per_chunk = 256 // tokens
        ids = rng.sample(range(pages), chunks * per_chunk)
        spans = [
            Span(index * slot, per_chunk, 0, ids[index * per_chunk : (index + 1) * per_chunk])
            for index in range(chunks)
        ]
        runs = len(planner.plan(spans).length)
        spent = _best(lambda p=planner, s=spans: p.plan(s))  # type: ignore[misc]
        rows[name] = {"runs": runs, "plan_ms": spent * 1e3, "us_per_run": spent / runs * 1e6}
    assert all(row["runs"] > 95_000 for row in rows.values()), "too few runs to speak of"
    return rows


def lookups() -> dict[str, Any]:
    """A full hit, keys and all, for prompts of several lengths; the keys alone beside it."""
    page_tokens = 16
    geometry = Geometry(page_tokens, 256 // page_tokens, (64,), bytes(32))
    decider = Decider(Slab.create(64 << 20), PluginManager().create_policy("LRU", 64 << 20))
    rng = random.Random(0)
    prompt = [rng.randrange(150_000) for _ in range(131_072)]
    root = root_key(NAMESPACE, Identity())

    def chain(length: int) -> KeyChain:
        return KeyChain(root, prompt[:length], page_tokens=page_tokens, pages_per_chunk=16)

    def look(length: int) -> int:
        hit = decider.lookup("bench", chain(length), geometry, length)
        decider.release(hit.lease)
        return hit.tokens

    slots, _ = decider.reserve(chain(len(prompt)), geometry, 0, len(prompt), tail=True)
    for slot in slots:
        decider.commit(slot, geometry)
    rows = {}
    for length in (1_024, 32_768, 131_072):
        assert look(length) == length, "every chunk must be found"
        rows[str(length)] = {
            "hit_ms": _best(lambda n=length: look(n)) * 1e3,  # type: ignore[misc]
            "keys_ms": _best(lambda n=length: chain(n).key(n // 256 - 1)) * 1e3,  # type: ignore[misc]
        }
    fresh = [rng.randrange(150_000) for _ in range(131_072)]
    miss = _best(
        lambda: decider.lookup(
            "bench",
            KeyChain(root, fresh, page_tokens=page_tokens, pages_per_chunk=16),
            geometry,
            len(fresh),
        )
    )
    rows["131072 cold"] = {"hit_ms": miss * 1e3, "keys_ms": 0.0}
    return rows


def index(policy: str, chunks: int = 1_000_000, evictions: int = 50_000) -> dict[str, Any]:
    """Memory per chunk, and the time to evict one and put another in its place."""
    geometry = Geometry(1, 1, (64,), bytes(32))
    size = CONTROL_BYTES + chunks * 8192  # a header, and a payload of its own page
    slab = Slab.create(size)
    keys = [ChunkKey(blake3(b"%d" % number).digest()) for number in range(chunks + evictions)]
    held = sum(sys.getsizeof(key) for key in keys[:chunks])
    tracemalloc.start()
    decider = Decider(slab, PluginManager().create_policy(policy, size))
    for key in keys[:chunks]:
        slot = decider.place(key, geometry, 1, 0, key)
        assert slot is not None
        decider.commit(slot, geometry)
    used = tracemalloc.get_traced_memory()[0] + held
    tracemalloc.stop()
    assert len(decider) == chunks, "the slab holds exactly the chunks"
    evict = decider._room_for
    evicting, placing = [], []

    def timed(size: int) -> int | None:
        begun = time.perf_counter()
        offset = evict(size)
        evicting.append(time.perf_counter() - begun)
        return offset

    decider._room_for = timed  # type: ignore[method-assign]
    for key in keys[chunks:]:
        begun = time.perf_counter()
        slot = decider.place(key, geometry, 1, 0, key)
        placing.append(time.perf_counter() - begun)
        assert slot is not None
        decider.commit(slot, geometry)
    slab.close()
    return {
        "policy": policy,
        "chunks": chunks,
        "bytes_per_chunk": used / chunks,
        "evict_p50_us": statistics.median(evicting) * 1e6,
        "evict_p99_us": statistics.quantiles(evicting, n=100)[98] * 1e6,
        "evict_and_place_p99_us": statistics.quantiles(placing, n=100)[98] * 1e6,
    }
