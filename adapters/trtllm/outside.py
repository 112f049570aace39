"""Loads that no pass waits for, on every rank: their requests run when they are over."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, wait
from typing import TYPE_CHECKING

from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

IDLE_S = 0.002
"""An executor that polls all the time keeps the interpreter's lock from the thread that copies."""


class OutsideLoads:
    """Makes loads one after another on a thread of its own.

    TensorRT-LLM names a request once; its end may be told from then on, and has to be told once.
    """

    def __init__(self) -> None:
        self._pool = DaemonPool(1, "lmcache-loads")
        self._loads: dict[int, Future[None]] = {}
        self._awaited: set[int] = set()
        self._excused: set[int] = set()

    def submit(self, request_id: int, load: Callable[[], None]) -> None:
        """Have the load of a request made. Raises `RuntimeError` after `stop`."""
        self._loads[request_id] = self._pool.submit(load)

    def excuse(self, requests: Iterable[int]) -> None:
        """These may be named by the next call, though nothing is loaded for them."""
        self._excused.update(requests)

    def take_ended(self, named: Iterable[int], *, is_idle: bool) -> list[int]:
        """The requests, of those that are or were named, whose loads are over.

        Raises what a load raised: its request was promised what is not there. Who has nothing else
        to do waits for a load, but not for long.
        """
        excused = sorted(self._excused.intersection(named) - self._loads.keys())
        self._excused = set()
        self._awaited.update(set(named).difference(excused))
        if lost := self._awaited - self._loads.keys():
            raise RuntimeError(f"requests {sorted(lost)} wait for loads that never began")
        loads = {request_id: self._loads[request_id] for request_id in self._awaited}
        if is_idle and loads:
            wait(loads.values(), IDLE_S, FIRST_COMPLETED)
        ended = sorted(request_id for request_id, load in loads.items() if load.done())
        for request_id in ended:
            self._awaited.remove(request_id)
            self._loads.pop(request_id).result()
        return excused + ended

    @property
    def is_busy(self) -> bool:
        """Whether a load has not ended. Any thread may ask."""
        return len(self._pool) > 0

    def stop(self) -> None:
        """Drop what has not begun."""
        self._pool.close()

    def join(self) -> None:
        """After `stop`, return when the load under way has ended."""
        self._pool.join()
