"""A small engine to test the core with: pages whose content follows from the tokens before them.

A real KV cache has that property: what lies in a page is a function of all tokens up to its end. So
whatever bytes a cache puts into a page can be checked without knowing where they came from.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

from lmcache.core.chain import KeyChain
from lmcache.core.decider import Decider
from lmcache.core.engine import CacheEngine
from lmcache.core.eviction.lru import LRUPolicy
from lmcache.core.geometry import Geometry, combined_layout
from lmcache.core.handover import Door, Hello, address_of
from lmcache.core.keys import Identity, Namespace, root_key
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.lent_memory import LentMemory
from lmcache.core.mover import Mover
from lmcache.core.slab import CONTROL_BYTES, Slab
from lmcache.core.tier import Tier
from lmcache.core.tiers import Tiers
from lmcache.core.write_policy import WritePolicy

PAGE_TOKENS = 4
PAGES_PER_CHUNK = 4
CHUNK_TOKENS = PAGE_TOKENS * PAGES_PER_CHUNK
REGIONS = 2
WIDTH = 24
"""Bytes of one token in one region."""
PAGE_BYTES = REGIONS * PAGE_TOKENS * WIDTH
SLOT = 8192
"""What a slot of any number of these pages takes."""
POISON = 0xA5
NAMESPACE = Namespace(model="rig", dtype="uint8", layout="rig")


def tokens(length, seed=0):
    """A token sequence that shares no chunk with those of other seeds."""
    return [(seed * 1_000_003 + 17 * i) % 50_000 for i in range(length)]


def content(sequence, page, *, salt="", slice_index=0):
    """What page number `page` of a sequence must hold, all regions in order."""
    seen = sequence[: (page + 1) * PAGE_TOKENS]
    assert len(seen) == (page + 1) * PAGE_TOKENS, "a page is whole"
    text = f"{salt}/{slice_index}/{','.join(map(str, seen))}"
    return blake3(text.encode()).digest(length=PAGE_BYTES)


class Pages:
    """An engine's pages: `REGIONS` arrays in ordinary memory."""

    def __init__(
        self,
        count=32,
        *,
        slice_index=0,
        width=WIDTH,
        page_tokens=PAGE_TOKENS,
        kind="rig",
        lends=False,
        memory=None,
    ):
        self.count = count
        self.slice_index = slice_index
        shape = (REGIONS, count, page_tokens, width)
        self.lent = None
        if memory is None:
            memory = np.empty(math.prod(shape), np.uint8)
        self.memory = memory[: math.prod(shape)].reshape(shape)
        self.memory[:] = POISON
        if lends:
            tensor = torch.from_numpy(self.memory).clone()
            self.lent = LentMemory([tensor])
            self.memory = tensor.numpy()
        self.layout = PageLayout(
            tuple(
                region_of(
                    f"layer.{index}",
                    self.memory[index].ctypes.data,
                    shape[1:],
                    (page_tokens * width, width, 1),
                    itemsize=1,
                    dtype="uint8",
                    page_axis=0,
                )
                for index in range(REGIONS)
            ),
            page_tokens,
            kind,
        )

    def compute(self, sequence, table, *, salt="", first=0):
        """Do what a forward pass does: fill the pages of a sequence from page `first` on."""
        for index in range(first, len(sequence) // PAGE_TOKENS):
            data = content(sequence, index, salt=salt, slice_index=self.slice_index)
            self.write(table[index], data)

    def write(self, page, data):
        self.memory[:, page] = np.frombuffer(data, np.uint8).reshape(self.memory[:, page].shape)

    def read(self, page):
        return self.memory[:, page].tobytes()

    def poison(self):
        self.memory[:] = POISON

    def wrong(self, sequence, table, stop, *, salt="", first=0):
        """The positions, before token `stop`, of pages that do not hold what they must."""
        return [
            index
            for index in range(first, stop // PAGE_TOKENS)
            if self.read(table[index])
            != content(sequence, index, salt=salt, slice_index=self.slice_index)
        ]

    def untouched(self, except_for=()):
        """Whether all other pages still hold nothing but poison."""
        others = [page for page in range(self.count) if page not in set(except_for)]
        return bool((self.memory[:, others] == POISON).all())


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def geometry(slices=1, *, pages_per_chunk=PAGES_PER_CHUNK, layout=None):
    """The geometry of `slices` movers that hold `Pages`."""
    return Geometry(
        page_tokens=PAGE_TOKENS,
        pages_per_chunk=pages_per_chunk,
        slices=(PAGE_BYTES,) * slices,
        layout=layout or combined_layout(["rig"] * slices),
    )


def chain(sequence, *, salt="", inserts=(), pages_per_chunk=PAGES_PER_CHUNK):
    return KeyChain(
        root_key(NAMESPACE, Identity(salt=salt)),
        sequence,
        page_tokens=PAGE_TOKENS,
        pages_per_chunk=pages_per_chunk,
        inserts=inserts,
    )


def decider(slots=8, **options):
    """A decider over a slab of exactly `slots` slots. Close `decider.slab` at the end."""
    policy = options.pop("policy", None) or LRUPolicy()
    return Decider(Slab.create(CONTROL_BYTES + slots * SLOT), policy, **options)


def hello(number=0, *, slice_index=None, pages=None, **changes):
    """How a mover of `pages` introduces itself."""
    pages = pages or Pages(1)
    said = {
        "number": number,
        "page_tokens": pages.layout.page_tokens,
        "page_bytes": pages.layout.page_bytes,
        "summary": pages.layout.summary,
        "slice_index": number if slice_index is None else slice_index,
        "pid": 1,
    }
    return Hello(**{**said, **changes})


def wait_until(condition, timeout_s=10.0):
    """Return once `condition()` is true; fail if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


class Process:
    """A mover or a decider in a process of its own; see `process.py`."""

    def __init__(self, role, engine, *numbers):
        program = Path(__file__).with_name("process.py")
        self._child = subprocess.Popen(
            [sys.executable, str(program), role, engine, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._child.pid

    def ready(self):
        """Wait until it has started."""
        assert self._answer() == "ready"
        return self

    def do(self, name, **details):
        self._child.stdin.write(json.dumps({"do": name, **details}) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._child.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    def stop(self):
        """SIGSTOP, and wait until every thread of it has stopped."""
        self._child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def go_on(self):
        self._child.send_signal(signal.SIGCONT)

    def kill(self):
        """SIGKILL: no handler of its runs."""
        self._child.kill()
        self._child.communicate()


def engine_id():
    """An engine's id that no other test, and no other run of this one, uses."""
    return f"test-{uuid.uuid4()}"


class Rank:
    """A worker of an engine, in this process."""

    def __init__(self, workshop, engine, number, *, slice_index=None, pages=None, **said):
        self.number = number
        self.slice_index = number if slice_index is None else slice_index
        self.pages = pages or Pages(32, slice_index=self.slice_index)
        self.mover = None
        self.old = []
        self.grant = None
        said_hello = hello(number, slice_index=self.slice_index, pages=self.pages, **said)
        self.door = Door(address_of(engine, number), said_hello, self.attach, self.leave)
        workshop.later(self.close)

    def attach(self, grant, fds):
        [fd] = fds
        self.grant = grant
        self.mover = Mover(
            self.pages.layout,
            Geometry(
                page_tokens=PAGE_TOKENS,
                pages_per_chunk=grant.pages_per_chunk,
                slices=grant.slices,
                layout=grant.layout,
            ),
            Slab(fd, grant.slab_bytes),
            number=grant.word,
            slice_index=self.slice_index,
            writes=grant.writes,
        )

    def leave(self):
        if self.mover:
            self.mover.retire()
            self.old.append(self.mover)

    def close(self):
        self.door.close()
        for mover in [*self.old, self.mover]:
            if mover:
                mover.close()


class Workshop:
    """Makes caches and closes them in the end, when nothing may be left in them."""

    def __init__(self):
        self._closers = []

    def later(self, close):
        """Call `close` in the end, before what was made earlier is closed."""
        self._closers.append(close)

    def decider(self, slots=8, **options):
        made = decider(slots, **options)
        self.later(made.slab.close)
        return made

    def mover(self, pages, made_geometry, slab, **options):
        """A mover of its own mapping of `slab`."""
        mover = Mover(pages.layout, made_geometry, Slab(os.dup(slab.fd), slab.size), **options)
        self.later(mover.close)
        return mover

    def tiers(self, made_decider, *backends, depth=4, write="through", **options):
        named = [
            backend
            if isinstance(backend, Tier)
            else Tier(f"t{index}", backend, depth, WritePolicy.parse(write))
            for index, backend in enumerate(backends)
        ]
        made = Tiers(made_decider, named, **options)
        self.later(made.close)
        return made

    def engine(
        self, slots=8, *backends, pages=None, chunk_size=CHUNK_TOKENS, tiers=None, **options
    ):
        """A whole cache with `pages`, found as `engine.pages`."""
        pages = pages or Pages()
        made_decider = decider(slots, **options)
        named = [Tier(f"t{index}", backend) for index, backend in enumerate(backends)]
        made_tiers = Tiers(made_decider, named, **(tiers or {}))
        made = CacheEngine(pages.layout, NAMESPACE, made_decider, made_tiers, chunk_size=chunk_size)
        made.pages = pages
        self.later(made.close)
        return made

    def process(self, role, engine, *numbers):
        made = Process(role, engine, *numbers)
        self.later(made.kill)
        return made

    def close(self):
        with ExitStack() as stack:
            while self._closers:
                stack.callback(self._closers.pop(0))


def assert_idle(made):
    """Nobody holds anything, and nothing that was ever taken is missing."""
    assert len(made.leases) == 0
    made.clear()
    assert len(made) == 0
    assert made.free_bytes == made.capacity_bytes
