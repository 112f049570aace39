"""Calls that may take only so long: a rule fails with the name of the call, and does not hang."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache.testing.faults import Wrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.backend import StorageBackend
    from lmcache.core.keys import ChunkKey

Answer = TypeVar("Answer")


class Hung(BaseException):
    """A call has not returned in time.

    No `Exception`, so that nobody tries the call again: what catches failures to look for a smaller
    example would wait for each of them.
    """


class Watch:
    """Makes calls for others, each of whom waits for `limit_s` seconds and no longer.

    Whoever calls has a thread of its own here, always the same one, since a client may keep a
    connection for each thread. A thread that hangs is left behind.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._mine = threading.local()

    def __call__(self, name: str, call: Callable[..., Answer], *args: Any) -> Answer:
        if not hasattr(self._mine, "helper"):
            self._mine.helper = _Helper()
        try:
            answer, error = self._mine.helper.ask(call, args).get(timeout=self._limit_s)
        except Empty:
            del self._mine.helper
            raise Hung(f"{name} has not returned after {self._limit_s} s") from None
        if error is not None:
            raise error
        return answer  # type: ignore[no-any-return]


class _Helper:
    """A thread that makes the calls of another, and ends with it."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), daemon=True).start()

    def ask(self, call: Callable[..., Any], args: tuple[Any, ...]) -> SimpleQueue[Any]:
        answers: SimpleQueue[Any] = SimpleQueue()
        self._calls.put((call, args, answers))
        return answers

    def __del__(self) -> None:
        self._calls.put(None)


def _serve(calls: SimpleQueue[Any]) -> None:
    while (asked := calls.get()) is not None:
        call, args, answers = asked
        try:
            answers.put((call(*args), None))
        except BaseException as error:  # noqa: BLE001
            answers.put((None, error))
        # or what the last call was given lives until the next one
        del asked, call, args, answers


class Watched(Wrapper):
    """`backend`, each call of which must end in time."""

    def __init__(self, backend: StorageBackend, watch: Watch) -> None:
        super().__init__(backend)
        self._watch = watch

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        return self._watch("put", self.backend.put, key, data)

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        return self._watch("get_into", self.backend.get_into, key, out)

    def contains(self, key: ChunkKey) -> bool:
        return self._watch("contains", self.backend.contains, key)

    def remove(self, key: ChunkKey) -> bool:
        return self._watch("remove", self.backend.remove, key)

    def discard_damaged(self, key: ChunkKey) -> bool:
        return self._watch("discard_damaged", self.backend.discard_damaged, key)

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        return self._watch("count_leading", self.backend.count_leading, keys)

    def close(self) -> None:
        self._watch("close", self.backend.close)
