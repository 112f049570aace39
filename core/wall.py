"""The wall between us and the engine: whatever goes wrong in a hook stops here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

Answer = TypeVar("Answer")

TOLERATED = 3
"""After so many unexpected errors the connector stays out of the way for good."""


class Wall:
    """What a connector knows of its own errors."""

    errors = 0

    def count_error(self, where: str) -> None:
        """Log the error at hand; to be called while it is handled."""
        self.errors += 1
        if self.errors <= TOLERATED:
            logger.exception("error %d of %d in %s", self.errors, TOLERATED, where)


def guarded(
    neutral: Callable[[], Answer],
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Log what goes wrong in a hook and answer `neutral()`: the engine would end otherwise."""

    def wrap(hook: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(hook)
        def call(self: Wall, *args: Any, **kwargs: Any) -> Answer:
            if self.errors >= TOLERATED:
                return neutral()
            try:
                return hook(self, *args, **kwargs)
            except Exception:
                self.count_error(hook.__name__)
                return neutral()

        return call

    return wrap


def nothing() -> None:
    """The neutral answer of a hook that answers nothing."""
