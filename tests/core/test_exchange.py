"""What engines of different kinds share is found by both, whatever pages they count in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rig
import torch

from lmcache.core.attachment import geometry_of
from lmcache.core.chain import KeyChain
from lmcache.core.engine import moves_for
from lmcache.core.errors import HandoverError, LayoutError
from lmcache.core.exchange import Content, check_alone, exchange_namespace
from lmcache.core.geometry import Geometry, combined_layout
from lmcache.core.kernels.copier import copier_for
from lmcache.core.keys import Identity, root_key
from lmcache.core.layout import PageLayout, Region, region_of
from lmcache.core.mover import Move, Mover
from lmcache.core.slab import CONTROL_BYTES

CONTENT = Content(layers=2, heads=3, head_dim=4, dtype="torch.float32", itemsize=4)
CHUNK = 16


class Engine:
    """Pages of `page_tokens` tokens, each kept as `places` say; in order without any."""

    def __init__(self, decider, page_tokens, places=None, pages=128):
        self.page_tokens = page_tokens
        words = page_tokens * CONTENT.heads * CONTENT.head_dim
        shape = (2 * CONTENT.layers, pages, words)
        self.memory = torch.full(shape, -1, dtype=torch.int32)
        self.places = torch.arange(words) if places is None else places
        regions = tuple(
            region_of(
                str(number),
                one.data_ptr(),
                one.shape,
                one.stride(),
                itemsize=4,
                dtype=f"of this engine {page_tokens}",
                page_axis=0,
            )
            for number, one in enumerate(self.memory)
        )
        self.layout = PageLayout(
            regions, page_tokens, f"engine {page_tokens}", common=CONTENT.summary
        )
        self.geometry = Geometry(
            page_tokens=page_tokens,
            pages_per_chunk=CHUNK // page_tokens,
            slices=(self.layout.page_bytes,),
            layout=combined_layout([self.layout.fingerprint]),
        )
        self.decider = decider
        tensors = list(self.memory)
        copier = None
        if places is not None:
            given = [places] * len(tensors)
            copier = copier_for(self.layout, decider.slab, tensors, places=given)
        self.mover = Mover(self.layout, self.geometry, decider.slab, copier=copier)

    def chain(self, tokens):
        return KeyChain(
            root_key(exchange_namespace("e", ""), Identity()),
            tokens,
            page_tokens=self.page_tokens,
            pages_per_chunk=self.geometry.pages_per_chunk,
        )

    def compute(self, tokens, table):
        """The words of a token say which it is, which region it is in, and where in its row."""
        for place, page in enumerate(table):
            some = torch.tensor(tokens[place * self.page_tokens : (place + 1) * self.page_tokens])
            row = torch.arange(CONTENT.heads * CONTENT.head_dim)
            for region in range(2 * CONTENT.layers):
                words = some[:, None] * 1000 + region * 100 + row
                self.memory[region, page, self.places] = words.ravel().to(torch.int32)

    def store(self, tokens, table):
        """How many tokens were stored."""
        chain, geometry = self.chain(tokens), self.geometry
        slots, _ = self.decider.reserve(chain, geometry, 0, len(tokens), tail=True)
        moves = moves_for(slots, geometry, table, 0, len(table))
        self.mover.store(moves)
        self.mover.publish(moves)
        for slot in slots:
            self.decider.commit(slot, geometry)
        return geometry.tokens_in(slots)

    def load(self, tokens, table):
        """How many tokens were found."""
        hit = self.decider.lookup("e", self.chain(tokens), self.geometry, len(tokens))
        _, failed = self.mover.load(moves_for(hit.slots, self.geometry, table, 0, len(table)))
        assert not failed
        self.decider.release(hit.lease)
        return hit.tokens


@pytest.fixture
def decider():
    return rig.decider(32)


@pytest.fixture
def make(decider):
    made = []

    def make(*kind):
        made.append(Engine(decider, *kind))
        return made[-1]

    yield make
    for engine in made:
        engine.mover.close()
    decider.slab.close()


SHUFFLED = torch.from_numpy(np.random.default_rng(1).permutation(4 * 12))


@pytest.mark.parametrize("length", [16, 40, 44, 46])
@pytest.mark.parametrize(
    ("first", "second"),
    [((1, None), (4, None)), ((4, SHUFFLED), (1, None)), ((1, None), (4, SHUFFLED))],
)
def test_one_loads_what_another_stored(make, first, second, length):
    one, other = make(*first), make(*second)
    tokens = rig.tokens(length)
    here = range(2, 2 + length // one.page_tokens)
    there = [*range(40, 40 + length // other.page_tokens)][::-1]
    one.compute(tokens, here)
    stored = one.store(tokens, here)
    assert stored == length // one.page_tokens * one.page_tokens
    found = other.load(tokens, there)
    assert length // CHUNK * CHUNK <= found <= stored
    if stored % 4 == 0:  # a tail has a key of its own length
        assert found == stored
    used = there[: found // other.page_tokens]
    loaded = other.memory.clone()
    other.memory[:] = -1
    other.compute(tokens[:found], used)
    assert torch.equal(loaded, other.memory)
    assert one.store(tokens[:found], here) == other.store(tokens[:found], there) == 0


def test_objects_are_the_same_bytes_whoever_stored_them(make, decider):
    kept = []
    for page_tokens, places in ((1, None), (4, SHUFFLED)):
        engine = make(page_tokens, places)
        tokens, table = rig.tokens(CHUNK), range(CHUNK // page_tokens)
        engine.compute(tokens, table)
        engine.store(tokens, table)
        hit = decider.lookup("e", engine.chain(tokens), engine.geometry, CHUNK)
        decider.release(hit.lease)
        [slot] = hit.slots
        start = slot.offset + engine.geometry.payload_offset(0, 0)
        kept.append(bytes(decider.slab.view[start : slot.offset + slot.size]))
        decider.clear()
    assert kept[0] == kept[1]


def test_a_page_that_there_is_not_is_refused(make, decider):
    engine = make(4, SHUFFLED)
    before = engine.memory.clone()
    for pages in ([128], [-1], [0, 128]):
        move = Move(CONTROL_BYTES, 0, 4, 0, pages)
        with pytest.raises(IndexError):
            engine.mover.store([move])
        decider.slab.write_word(CONTROL_BYTES + engine.geometry.tag_offset(0), 0)
        with pytest.raises(IndexError):
            engine.mover.load([move])
    assert torch.equal(engine.memory, before)


def test_one_region_alone(make):
    engine = make(4, SHUFFLED)
    engine.compute(rig.tokens(8), [3, 1])
    before = engine.memory.clone()
    move = Move(CONTROL_BYTES, 7, 2, 0, [3, 1])
    engine.mover.store([move])
    engine.mover.publish([move])
    engine.memory[:] = -1
    size, failed = engine.mover.load([move], region=2)
    assert (size, failed) == (2 * 4 * 48, [])
    assert torch.equal(engine.memory[2], before[2])
    assert (engine.memory[[0, 1, 3]] == -1).all()


class TestKeys:
    def test_no_two_contents_are_alike(self):
        changes = [
            {},
            {"layers": 3},
            {"heads": 4},
            {"head_dim": 3},
            {"dtype": "torch.bfloat16"},
        ]
        layouts = {
            PageLayout(_regions(), 4, "x", common=replace(CONTENT, **change).summary).fingerprint
            for change in changes
        }
        assert len(layouts) == len(changes)

    def test_pages_do_not_count(self):
        one, other = (
            PageLayout(_regions(), size, kind, common=CONTENT.summary)
            for size, kind in ((1, "x"), (16, "y"))
        )
        assert one.fingerprint == other.fingerprint
        assert one.fingerprint != PageLayout(_regions(), 1, "x").fingerprint

    def test_no_two_exchanges_are_alike(self):
        roots = {
            root_key(exchange_namespace(*said), Identity())
            for said in (("a", ""), ("b", ""), ("a", "b"), ("ab", ""))
        }
        assert len(roots) == 4


class TestRefusals:
    def test_chunks_that_would_be_of_another_size(self):
        hello = rig.hello(page_tokens=6, summary=CONTENT.summary)
        assert geometry_of([hello], 18).chunk_tokens == 18
        with pytest.raises(HandoverError, match="chunks of 16 tokens are no whole pages of 6"):
            geometry_of([hello], 16)
        assert geometry_of([rig.hello(page_tokens=6)], 16).chunk_tokens == 18

    @pytest.mark.parametrize("dtype", ["torch.uint8", "torch.float8_e4m3fn", "torch.int32"])
    def test_what_may_be_quantized_in_more_than_one_way(self, dtype):
        with pytest.raises(LayoutError, match=f"not for {dtype}"):
            replace(CONTENT, dtype=dtype)

    def test_several_ranks(self):
        check_alone(1)
        with pytest.raises(LayoutError, match="one rank, this one has 2"):
            check_alone(2)


def _regions():
    return (Region("x", 0, 1, 48, (), 48, "x"),)
