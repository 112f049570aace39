"""Keeps an engine attached to a cache for as long as both live, off the scheduler's thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from lmcache.core.errors import ConfigError, HandoverError, LMCacheError, PluginError
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

Answer = TypeVar("Answer")


class Attached(Protocol):
    """What an engine is joined to, until it is not whole any more."""

    def is_whole(self) -> bool:
        """Whether nothing of it is lost. Never blocks."""

    def close(self) -> None:
        """Let go of it."""


Cache = TypeVar("Cache", bound=Attached)


class Joining(Generic[Cache]):
    """Keeps trying to be attached, on a thread of its own, so that the scheduler never waits."""

    FIRST_WAIT_S = 2.0
    PAUSES_S = (0.1, 0.3, 1.0, 2.0)
    WATCH_S = 0.5
    LOSS_S = 2.0
    """An engine that shuts down loses its movers first, and that is nothing to warn of."""

    def __init__(
        self,
        attach: Callable[[], Cache],
        lost: str = "a mover is gone",
        watch_s: float | None = None,
    ) -> None:
        """`attach` is called until it succeeds, and again whenever what it made is not whole.

        That is looked at every `watch_s` seconds, by default `WATCH_S`; `lost` says what it means.

        Returns after the first attempt or `FIRST_WAIT_S`, whichever comes first. Raises what the
        first attempt raised if trying again would not help: `ConfigError` or `PluginError`.
        """
        self._attach = attach
        self._lost = lost
        self._watch_s = watch_s or self.WATCH_S
        self._current: Cache | None = None
        self._hopeless: LMCacheError | None = None
        self._tried = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmcache-joining", daemon=True)
        self._thread.start()
        self._tried.wait(self.FIRST_WAIT_S)
        if self._hopeless:
            self.close()
            raise self._hopeless

    def current(self) -> Cache | None:
        """The attachment, if there is one. Never blocks."""
        return self._current

    def close(self) -> None:
        """Stop trying, and let go of what is attached."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._current = self._attempt(self._attach)
            except LMCacheError as error:
                if failures == 0:
                    if isinstance(error, (ConfigError, PluginError)):
                        self._hopeless = error
                    logger.warning("serving without a cache for now: %s", error)
                pause = self.PAUSES_S[min(failures, len(self.PAUSES_S) - 1)]
                failures += 1
                self._tried.set()
                self._stop.wait(pause)
                continue
            failures = 0
            self._tried.set()
            self._watch(self._current)
            if not self._stop.wait(self.LOSS_S):
                logger.warning("%s; serving without a cache until it is back", self._lost)

    def _watch(self, attachment: Cache) -> None:
        while attachment.is_whole() and not self._stop.is_set():
            self._stop.wait(self._watch_s)
        self._current = None
        try:
            self._attempt(attachment.close)
        except LMCacheError as error:
            logger.warning("while detaching: %s", error)

    def _attempt(self, what: Callable[[], Answer]) -> Answer:
        """Whatever goes wrong, this thread must go on: no memory, or an error of a plugin's own."""
        try:
            return what()
        except LMCacheError:
            raise
        except Exception as error:
            raise HandoverError(repr(error)) from error
