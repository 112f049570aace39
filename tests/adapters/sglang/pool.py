"""SGLang's pool of one rank, and what its radix tree does with a connector.

What belongs into a slot is a function of all tokens up to its own, of the layer and of the rank, so
whatever a connector loads can be checked without knowing where it came from.
"""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import torch
from blake3 import blake3

from lmcache.integration.sglang.sglang_adapter import LoadMetadata, StoreMetadata

HEADS, WIDTH = 2, 16
POISON = 0xA5
MODEL = SimpleNamespace(model_path="tiny")


def tokens(length, seed=0):
    """A prompt that shares no chunk with those of other seeds, as newer versions hold it."""
    return array("q", [(seed * 1_000_003 + 17 * i) % 50_000 for i in range(length)])


class Pool:
    """Keys and values of some layers, and the slots that are free."""

    def __init__(self, slots=400, *, layers=3, rank=0, seed=1):
        self.layers, self.rank = layers, rank
        shape = (slots + 1, HEADS, WIDTH)
        self.k = [torch.full(shape, POISON, dtype=torch.uint8) for _ in range(layers)]
        self.v = [torch.full(shape, POISON, dtype=torch.uint8) for _ in range(layers)]
        self.free = list(range(1, slots + 1))  # the first one takes what nobody wants
        random.Random(seed).shuffle(self.free)
        self.slots = slots

    def take(self, count):
        """Fresh slots, in no order."""
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "the pool is exhausted"
        return taken

    def give(self, slots):
        """Slots that are free again; what is in them must not be read."""
        assert not set(slots) & set(self.free)
        self.free += slots

    def row(self, prompt, place, layer, kind):
        seen = ",".join(map(str, prompt[: place + 1]))
        text = f"{seen}/{layer}/{kind}/{self.rank}"
        return list(blake3(text.encode()).digest(length=HEADS * WIDTH))

    def compute(self, prompt, slots, start=0):
        """Fill the slots of a prompt's tokens from `start` on."""
        for place in range(start, len(slots)):
            for layer in range(self.layers):
                for kind, pool in (("k", self.k), ("v", self.v)):
                    row = torch.tensor(self.row(prompt, place, layer, kind), dtype=torch.uint8)
                    pool[layer][slots[place]] = row.view(HEADS, WIDTH)

    def wrong(self, prompt, slots, layer):
        """The places whose slots do not hold what they must, in one layer."""
        return [
            place
            for place, slot in enumerate(slots)
            if self.k[layer][slot].flatten().tolist() != self.row(prompt, place, layer, "k")
            or self.v[layer][slot].flatten().tolist() != self.row(prompt, place, layer, "v")
        ]

    def snapshot(self):
        """A copy of everything."""
        return torch.stack([*self.k, *self.v])


def mapping(absent, slots, *, dtype=torch.int64):
    """Where tokens are to be loaded: nowhere, for those that SGLang has itself."""
    return torch.tensor([-1] * absent + list(slots), dtype=dtype)


def match(connector, pool, prompt, have=()):
    """What SGLang's tree does about a prompt of which it has the slots `have`.

    The slots of all that is there then. Layers but the first are still to come.
    """
    chunk = connector.chunk_size()
    fresh = pool.take(len(prompt) - len(have))
    pad = len(have) % chunk
    came = connector.start_load_kv(
        LoadMetadata(
            token_ids=prompt, slot_mapping=mapping(len(have), fresh), offset=len(have) - pad
        )
    )
    assert came == 0 or pad < came <= len(prompt) - (len(have) - pad), "slots would be lost"
    kept = max(0, came - pad)
    pool.give(fresh[kept:])
    return [*have, *fresh[:kept]]


def forward(connector, layers, look=None):
    """Read every layer, keys and then values, as any forward pass does."""
    for layer in range(layers):
        if look:
            look(layer)
        connector.load_kv_layerwise(layer)
        connector.load_kv_layerwise(layer)


def finish(connector, prompt, slots):
    """A request has ended whose tokens all have a slot."""
    connector.store_kv(
        StoreMetadata(
            last_node=object(),
            token_ids=prompt,
            kv_indices=torch.tensor(slots, dtype=torch.int32),
            offset=0,
        )
    )
