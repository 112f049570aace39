"""Blocks of one pool: who holds them, and which of the free ones still hold a known prefix."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass
class Known:
    """A block that holds the end of a prefix."""

    block: int
    tokens: tuple
    parent: tuple | None


class Blocks:
    """Reference-counted; with `reuse`, what is known stays until its room is needed."""

    def __init__(self, count, bs, *, reuse=True, seed=1):
        self.bs, self.reuse = bs, reuse
        self.free = list(range(count))
        # in no order, and the last one freed is the first one taken
        random.Random(seed).shuffle(self.free)
        self.holders = [0] * count
        self.known = {}
        self.key_of = {}

    @property
    def room(self):
        """How many blocks can be had."""
        return len(self.free) + sum(1 for b in self.key_of if not self.holders[b])

    def take(self):
        """A block, and whether what was known in it is lost."""
        lost = not self.free
        block = self._evict() if lost else self.free.pop()
        self.holders[block] = 1
        return block, lost

    def _evict(self):
        parents = {known.parent for known in self.known.values()}
        free = [key for key, known in self.known.items() if not self.holders[known.block]]
        assert free, "the pool is exhausted"
        # the end of a prefix goes first, or what follows could not be found any more
        key = next((key for key in free if key not in parents), free[0])
        block = self.known[key].block
        self._forget(key)
        return block

    def _forget(self, key):
        del self.key_of[self.known.pop(key).block]

    def hold(self, blocks):
        for block in blocks:
            self.holders[block] += 1

    def release(self, blocks):
        """Drop a hold; the blocks that are nobody's now."""
        gone = []
        for block in reversed(blocks):
            self.holders[block] -= 1
            assert self.holders[block] >= 0
            if not self.holders[block] and block not in self.key_of:
                self.free.append(block)
                gone.append(block)
        return gone

    def key(self, identity, tokens, number):
        return (identity, tuple(tokens[: (number + 1) * self.bs]))

    def learn(self, identity, tokens, valid, blocks):
        """Remember the whole blocks of a sequence of which `valid` tokens are computed."""
        parent = None
        for number in range(valid // self.bs if self.reuse else 0):
            key = self.key(identity, tokens, number)
            if key not in self.known and blocks[number] not in self.key_of:
                part = tuple(tokens[number * self.bs : (number + 1) * self.bs])
                self.known[key] = Known(blocks[number], part, parent)
                self.key_of[blocks[number]] = key
            parent = key

    def match(self, identity, tokens, *, partial=False):
        """Blocks of a prefix that leaves one token, and a block with some tokens more."""
        found, parent = [], None
        while self.reuse and (len(found) + 1) * self.bs < len(tokens):
            key = self.key(identity, tokens, len(found))
            if key not in self.known:
                break
            self.known[key] = self.known.pop(key)  # the last one used is the last one to go
            found.append(self.known[key].block)
            parent = key
        rest = tuple(tokens[len(found) * self.bs : len(tokens) - 1])
        extra = self._partial(parent, rest, identity) if partial and self.reuse else (None, 0)
        return found, *extra

    def _partial(self, parent, rest, identity):
        best = (None, 0)
        for key, known in self.known.items():
            if known.parent == parent and key[0] == identity:
                same = 0
                while same < min(len(rest), self.bs) and rest[same] == known.tokens[same]:
                    same += 1
                best = max(best, (known.block, same), key=lambda each: each[1])
        return best

    def forget_all(self):
        """Drop all that is known and not held; these blocks."""
        gone = [b for b in self.key_of if not self.holders[b]]
        for block in gone:
            self._forget(self.key_of[block])
            self.free.append(block)
        return gone
