"""The stores of each step: on the worker's main thread, or behind it where a device computes."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from lmcache.core.fence import Fence
from lmcache.core.log import init_logger
from lmcache.core.mover import pages_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.adapters.vllm.step import Copy, Step, StoredEvent
    from lmcache.core.kernels.staging import Event
    from lmcache.core.lender import Lender
    from lmcache.core.mover import Move, Mover

logger = init_logger(__name__)


class Stores:
    """Makes them in the order of the steps. All but the copies is for the main thread."""

    def __init__(self, *, behind: bool) -> None:
        """Not `behind`, the main thread waits for each of them, wherever the pages are."""
        self._behind = behind
        self._fence = Fence()
        self._asked: set[int] = set()
        """Regions of the step at hand whose layers have been computed."""
        self._stored: list[int] = []
        """Those of them that are stored; it is a new list for each step."""
        self._events: deque[StoredEvent] = deque()

    def begin(self, step: Step) -> None:
        """A step is at hand: no store may read the pages that it writes to any more."""
        self._asked, self._stored = set(), []
        loaded = (page for move in step.all_loads() for page in move.engine_pages)
        self._fence.wait_for(chain(step.fresh, step.lost, loaded))

    def layer(self, mover: Mover | Lender, step: Step, region: int) -> None:
        """A layer of the step has been computed."""
        if region in self._asked:
            return
        self._asked.add(region)
        moves, stored = step.all_stores(), self._stored

        def store(after: Event | None) -> None:
            mover.store(moves, region, after)
            stored.append(region)

        self._make(mover, moves, store)

    def rest(self, mover: Mover | Lender, copies: list[Copy], ended: Callable[[], None]) -> None:
        """Store what no layer has stored, and call `ended` when nothing of the step is under way.

        Also with no `copies`, for layers may be.
        """
        done = self._stored

        def store(after: Event | None) -> None:
            try:
                for copy in copies:
                    self._store(mover, copy, done, after)
            finally:
                ended()

        self._make(mover, [move for copy in copies for move in copy.moves], store)

    def take_events(self) -> list[StoredEvent]:
        """What was stored since the last call, if events are wanted."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def close(self) -> None:
        """Drop the stores that have not begun."""
        self._fence.close()

    # ----

    def _make(
        self, mover: Mover | Lender, moves: list[Move], store: Callable[[Event | None], None]
    ) -> None:
        after = mover.mark()
        if after is None or not self._behind:
            store(after)
        else:
            self._fence.submit(partial(store, after), pages_of(moves))

    def _store(
        self, mover: Mover | Lender, copy: Copy, done: list[int], after: Event | None
    ) -> None:
        started = time.perf_counter()
        regions: list[int | None] = [None]
        if done:
            regions = [i for i in range(len(mover.layout.regions)) if i not in done]
        size = sum(mover.store(copy.moves, region, after) for region in regions)
        copied = time.perf_counter()
        mover.publish(copy.moves)
        self._events.extend(copy.events)
        spent = time.perf_counter() - started
        if not size and not done:  # another rank's to store, or the slab has been left
            return
        logger.info(
            "Stored %d out of total %d tokens. size: %.4f gb, cost %.4f ms, "
            "throughput: %.4f GB/s; offload_time: %.4f ms, put_time: %.4f ms",
            copy.tokens,
            copy.required,
            size / 1e9,
            spent * 1e3,
            size / 1e9 / max(spent, 1e-9),
            (copied - started) * 1e3,
            (spent - copied + started) * 1e3,
        )
