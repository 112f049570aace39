"""What a model leaves in its KV cache, and pools that are real tensors in ordinary memory.

What belongs to a position is a function of all tokens up to it, of the salt, the adapter and the
images they stand for, of the layer, of K or V and of the rank. So whatever a connector loads can be
checked without knowing where it came from.
"""

from __future__ import annotations

import numpy as np
import torch
from blake3 import blake3
from standin_layout import KvCacheLayerGroup, KvCacheRegion

HEADS = 2
WIDTH = 8
"""Bytes of one head of one token, in K or in V of one layer."""


def digests_of(tokens, salt=None, lora=None, media=()):
    """One number for each position that depends on everything up to it."""
    state = blake3(repr((salt, lora)).encode()).digest()
    images = {start: hashed for start, _, hashed in media}
    found = np.empty(len(tokens), np.uint64)
    for place, token in enumerate(tokens):
        text = f"{token}/{images.get(place)}"
        state = blake3(state + text.encode()).digest()
        found[place] = int.from_bytes(state[:8], "little")
    return found


def next_token(digests):
    """What a model says after a sequence."""
    return int(digests[-1] % 50_000)


class Pool:
    """The blocks of some layers on one rank, and a shadow that only the engine writes to."""

    def __init__(self, blocks, layers, *, rank=0, kv=2, bs=32, dtype=torch.float32, split=False):
        self.blocks, self.layers, self.rank, self.kv, self.bs = blocks, layers, rank, kv, bs
        self.dtype, self.split = dtype, split
        self._frees = 0
        inner = (HEADS, bs, WIDTH)
        outer = (len(layers), kv)
        shape = (*outer, blocks, *inner) if split else (blocks, *outer, *inner)
        self.memory = torch.empty(shape, dtype=torch.uint8)
        self.view = self._block_first(self.memory)
        self.poison(range(blocks))
        self._shadow = self.memory.clone()
        self.shadow = self._block_first(self._shadow)
        self._weights = self._make_weights()

    def _block_first(self, memory):
        return memory.permute(2, 0, 1, 3, 4, 5) if self.split else memory

    def _make_weights(self):
        names = [
            f"{layer}/{kv}/{self.rank}/{place}"
            for layer in self.layers
            for kv in range(self.kv)
            for place in range(HEADS * WIDTH)
        ]
        whole = b"".join(blake3(name.encode()).digest(length=8) for name in names)
        return np.frombuffer(whole, np.uint64) | 1

    def tensor(self):
        """What version 1 hands over: [blocks, layers, K and V, flat]."""
        assert not self.split
        return self.memory.flatten(3).view(self.dtype)

    def group(self, number, window):
        """What version 2 hands over."""
        return KvCacheLayerGroup(number, tuple(self.layers), window, tuple(self._regions()))

    def _regions(self):
        parts = [(0, 0)]
        if self.split:
            parts = [(at, kv) for at in range(len(self.layers)) for kv in range(self.kv)]
        for at, kv in parts:
            slots = self.memory[at, kv].flatten(1) if self.split else self.memory.flatten(1)
            layers = [self.layers[at]] if self.split else self.layers
            roles = "kv"[kv : kv + 1] if self.split else "kv"[: self.kv]
            buffers = tuple((layer, role, 1) for layer in layers for role in roles)
            size = slots.shape[1]
            yield KvCacheRegion(slots.data_ptr(), size, size, self.blocks, buffers, slots)

    # --- what the engine does, on the stream

    def expected(self, digests):
        """[positions, layers, kv, heads, width]"""
        mixed = (digests[:, None] * self._weights[None, :]) >> np.uint64(56)
        shape = (len(digests), len(self.layers), self.kv, HEADS, WIDTH)
        return torch.from_numpy(mixed.astype(np.uint8)).view(shape)

    def write(self, digests, places, table):
        """Compute positions into the blocks of a table."""
        if len(places):
            blocks, slots = self._where(places, table)
            value = self.expected(digests[places])
            for view in (self.view, self.shadow):
                view[blocks, :, :, :, slots] = value

    def wrong(self, digests, places, table):
        """The positions that do not hold what they must."""
        if not len(places):
            return []
        blocks, slots = self._where(places, table)
        good = self.view[blocks, :, :, :, slots] == self.expected(digests[places])
        return [places[i] for i in (~good.flatten(1).all(1)).nonzero().flatten().tolist()]

    def _where(self, places, table):
        places = np.asarray(places)
        blocks = np.asarray(table)[places // self.bs]
        assert (blocks >= 0).all(), "a position whose block is gone"
        return torch.from_numpy(blocks), torch.from_numpy(places % self.bs)

    def copy(self, source, target):
        for view in (self.view, self.shadow):
            view[target] = view[source]

    def poison(self, blocks):
        """Each time another pattern, so that no two frees look the same."""
        self._frees += 1
        blocks = list(blocks)
        for view in (self.view, getattr(self, "shadow", None)):
            if view is not None:
                view[blocks] = 0xA5 ^ (self._frees % 64)

    def veil(self, blocks):
        """Turn every bit over: who writes what was there already shows when it is done again."""
        self.view[blocks] ^= 0xFF

    def accept(self, blocks):
        """What was loaded here was looked at, and is the engine's from now on."""
        self.shadow[list(blocks)] = self.view[list(blocks)]

    def strange(self, but_for=()):
        """Blocks that somebody else wrote to."""
        differ = (self.view != self.shadow).flatten(1).any(1)
        return sorted(set(differ.nonzero().flatten().tolist()) - set(but_for))
