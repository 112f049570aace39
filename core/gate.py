"""Lets calls through until it is shut, and says when the last of them has come out."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Gate:
    """Open when made. Any thread may pass it and any may shut it."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_shut = False
        self._changed = threading.Condition()

    @contextmanager
    def passage(self) -> Iterator[bool]:
        """Be inside for the length of a `with`; False if the gate is shut, and nobody is."""
        with self._changed:
            admitted = not self._is_shut
            self._inside += admitted
        try:
            yield admitted
        finally:
            if admitted:
                with self._changed:
                    self._inside -= 1
                    self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more; returns when nobody is inside. Again does nothing."""
        with self._changed:
            self._is_shut = True
            self._changed.wait_for(lambda: not self._inside)
