"""Ranks that are threads: they meet at a barrier, and notice when one of them does not come."""

from __future__ import annotations

import pickle
import threading
from contextlib import contextmanager

_bound = threading.local()


class OutOfStep(RuntimeError):
    """Ranks that did not meet; a real world would wait for ever."""


class World:
    """What the ranks of one executor share."""

    def __init__(self, size, judge, patience_s=10.0):
        self.size, self.judge, self.patience_s = size, judge, patience_s
        self._barrier = threading.Barrier(size)
        self._offers = [None] * size
        self._has_failed = False

    def meet(self, rank, what, value):
        """What every rank brought to a collective of one name."""
        self._offers[rank] = (what, pickle.dumps(value))
        self._wait(what)
        offers = list(self._offers)
        self._wait(what)
        names = {name for name, _ in offers}
        if len(names) > 1:
            self._part(f"ranks are out of step: {sorted(names)}")
        return [pickle.loads(data) for _, data in offers]

    def _wait(self, what):
        try:
            self._barrier.wait(self.patience_s)
        except threading.BrokenBarrierError:
            self._part(f"dead-lock in {what}: not every rank came")

    def _part(self, text):
        # who waits for a rank that has failed is not to blame
        self.judge.expect(self._has_failed, "dead-lock", text)
        raise OutOfStep(text)

    def leave(self):
        """A rank that has failed: nobody need wait for it."""
        self._has_failed = True
        self._barrier.abort()


class Communicator:
    """One rank's end."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world
        self._is_alone = False

    @property
    def size(self):
        return self.world.size

    def broadcast(self, value, root=0, what="broadcast"):
        return self._meet(what, value)[root]

    def allgather(self, value, what="allgather"):
        return self._meet(what, value)

    def _meet(self, what, value):
        if self._is_alone and self.size == 1:
            self.world.judge.expect(False, "dead-lock", f"{what} where only the leader is")
        return self.world.meet(self.rank, what, value)

    @contextmanager
    def alone(self):
        """Code that no other rank runs meanwhile, and so must not wait for one."""
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False


@contextmanager
def bound(communicator):
    """This thread is a rank's."""
    before = getattr(_bound, "communicator", None)
    _bound.communicator = communicator
    try:
        yield
    finally:
        _bound.communicator = before


def current():
    communicator = getattr(_bound, "communicator", None)
    if communicator is None:
        raise RuntimeError("this thread belongs to no rank")
    return communicator


def mpi_rank():
    return current().rank


def mpi_world_size():
    return current().size


def mpi_broadcast(obj, root=0):
    return current().broadcast(obj, root)


def mpi_allgather(obj):
    return current().allgather(obj)
