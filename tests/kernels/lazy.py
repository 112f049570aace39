"""A device that is as late, and as out of order, as streams and events allow.

Nothing is done before somebody waits for it, and then any stream may be first that is not itself
waiting. What a missing wait lets happen, happens here with some seed.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque

import numpy as np

POISON = 0xEE


class Event:
    def __init__(self, device):
        self.device = device
        self.is_over = False

    def synchronize(self):
        self.device.run_until(lambda: self.is_over)


class Stream:
    def __init__(self, device):
        self.device = device
        self.queue = deque()

    def copy(self, target, source, length, *, stays):
        early = self.device.read_early(source, length) if stays else None
        source = source if early is None else early.runs
        self._add(lambda kept=early: self.device.copy_runs(target, source, length))

    def launch(self, regions, pages, *, to_stored):
        def work():
            for region in regions:
                engine, stored, length = self.device.place(pages, region)
                ends = (stored, engine) if to_stored else (engine, stored)
                self.device.copy_runs(*ends, length)

        self._add(work)

    def call(self, work):
        self._add(work)

    def record(self):
        event = Event(self.device)
        self._add(lambda: setattr(event, "is_over", True))
        return event

    def wait(self, event):
        self._add(event)

    def synchronize(self):
        self.device.run_until(lambda: not self.queue)

    def _add(self, work):
        with self.device.lock:
            self.queue.append(work)
            self.device.maybe_run()

    def step(self):
        """Do what is next; whether anything could be done."""
        if not self.queue:
            return False
        if isinstance(self.queue[0], Event):
            if not self.queue[0].is_over:
                return False
            self.queue.popleft()
            return True
        self.queue.popleft()()
        return True


class Memory:
    def __init__(self, size):
        self.array = np.full(size, POISON, np.uint8)
        self.address = self.array.ctypes.data


class LazyDevice:
    """For any thread."""

    kernels_only = False

    def __init__(self, planner, seed):
        self.lock = threading.RLock()
        self.planner = planner
        self.random = random.Random(seed)
        self.streams = []
        self.made = []
        self.copied = []
        """Of each run that was copied: target, source, length."""

    def stream(self):
        with self.lock:
            self.streams.append(Stream(self))
            return self.streams[-1]

    def buffer(self, size):
        self.made.append(Memory(size))
        return self.made[-1]

    pinned = buffer

    def place(self, pages, region):
        [shape] = [s for s in self.planner.shapes if region in s.members]
        return shape.place(pages, region)

    def read_early(self, source, length):
        """What stays as it is may be read at once, whatever is queued before; or it is not."""
        with self.lock:
            if self.random.random() < 0.5:
                return None
            early = Memory(int(length.sum()))
            early.runs = np.cumsum(length) - length + early.address
            self.copy_runs(early.runs, source, length)
            return early

    def copy_runs(self, target, source, length):
        for a, b, n in zip(target.tolist(), source.tolist(), length.tolist(), strict=True):
            ctypes.memmove(a, b, n)
            self.copied.append((a, b, n))

    def maybe_run(self):
        while self.random.random() < 0.3 and self._step():
            pass

    def run_until(self, is_enough):
        while True:
            with self.lock:
                if is_enough():
                    return
                assert self._step(), "a wait that never ends"

    def _step(self):
        streams = self.random.sample(self.streams, len(self.streams))
        return any(stream.step() for stream in streams)
