"""Streams that do nothing before somebody waits, so that a missing wait is a wrong result."""

from __future__ import annotations

import threading
from collections import deque

LOCK = threading.RLock()
"""One for all: streams wait for each other from any thread."""


class FakeStream:
    """Work in order. `enqueue` is what a kernel launch is."""

    def __init__(self, name="side"):
        self.name = name
        self._queue = deque()
        self._asked, self._done = 0, 0
        self.waited_for = False
        """Whether its owner had to wait for work on it, since this was last set to False."""
        self.owner = threading.get_ident()

    def enqueue(self, work):
        with LOCK:
            self._queue.append(work)
            self._asked += 1

    def synchronize(self):
        self.run_to(self._asked)

    def run_to(self, mark):
        with LOCK:
            while self._done < mark:
                self.waited_for |= threading.get_ident() == self.owner
                self._done += 1
                self._queue.popleft()()

    def query(self):
        with LOCK:
            return self._done == self._asked

    def record_event(self, event=None):
        event = event or FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event):
        self.enqueue(event.synchronize)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def __getattr__(self, name):
        raise AttributeError(f"there is no device, and a stream has no {name!r}")


class FakeEvent:
    """A place in a stream's order."""

    PATIENCE = 1
    """How often `query` says no before the device gets there by itself."""

    def __init__(self):
        self._stream, self._mark, self._asked = None, 0, 0

    def record(self, stream):
        self._stream, self._mark, self._asked = stream, stream._asked, 0

    def synchronize(self):
        if self._stream is not None:
            self._stream.run_to(self._mark)

    def wait(self, stream):
        stream.wait_event(self)

    def query(self):
        with LOCK:
            if self._stream is None or self._stream._done >= self._mark:
                return True
            self._asked += 1
            if self._asked > self.PATIENCE:
                self.synchronize()
            return self._asked > self.PATIENCE
