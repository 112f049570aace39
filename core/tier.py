"""One storage backend behind the slab, and whether it deserves to be asked."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from lmcache.core.errors import BackendError
from lmcache.core.log import init_logger
from lmcache.core.pool import DaemonPool
from lmcache.core.write_policy import WritePolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend
    from lmcache.core.metrics import Counters

logger = init_logger(__name__)

Answer = TypeVar("Answer")

TRIES = 3
REST_S = 10.0
"""After `TRIES` failures in a row a backend is left alone for this long."""
DEPTH = 4
THROUGH = WritePolicy()


@dataclass
class Tier:
    """One backend. The one place where `BackendError` becomes a miss and a counter."""

    name: str
    backend: StorageBackend
    depth: int = DEPTH
    """Objects that are read at a time, and as many that are written."""
    write: WritePolicy = THROUGH
    exact: bool = True
    """Whether what is read is, to the last bit, what was written."""
    failures: int = 0
    """In a row."""
    asleep_until: float = 0.0
    calls: int = 0
    """Under way now."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        """Readers never wait behind writers, nor one tier behind another."""
        self.reads = DaemonPool(self.depth, f"lmcache-read-{self.name}")
        self.writes = DaemonPool(self.depth, f"lmcache-write-{self.name}")

    def is_awake(self) -> bool:
        """Whether the backend may be asked now."""
        return time.monotonic() >= self.asleep_until

    def ask(self, call: Callable[[StorageBackend], Answer], counters: Counters) -> Answer | None:
        """What `call` returns; None, and a failure more, if it raises whatever it raises."""
        if not self.is_awake():
            return None
        try:
            answer = self._call(call)
        except BackendError as error:
            counters.add("tier_errors", label=self.name)
            self.failed(error)
            return None
        self.failures = 0
        return answer

    def _call(self, call: Callable[[StorageBackend], Answer]) -> Answer:
        with self.lock:
            self.calls += 1
        try:
            return call(self.backend)
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"{type(self.backend).__name__} raised {error!r}") from error
        finally:
            with self.lock:
                self.calls -= 1

    def failed(self, error: BackendError) -> None:
        """Take note of a failure; after several in a row, rest."""
        self.failures += 1
        if self.failures >= TRIES and self.is_awake():
            self.asleep_until = time.monotonic() + REST_S
            logger.warning("tier %s rests for %.0f s: %s", self.name, REST_S, error)
