"""The one place where log lines get their shape."""

from __future__ import annotations

import logging
import os

_FORMAT = "[%(asctime)s] LMCache %(levelname)s: %(message)s (%(filename)s:%(lineno)d:%(name)s)"


def init_logger(name: str) -> logging.Logger:
    """A logger below `lmcache` that writes to standard error at level `LMCACHE_LOG_LEVEL`.

    An application that has set up handlers for `lmcache` itself keeps them.
    """
    root = logging.getLogger("lmcache")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)
        root.setLevel(os.environ.get("LMCACHE_LOG_LEVEL", "INFO").upper())
        root.propagate = False
    return logging.getLogger(name)


def log_copies(logger: logging.Logger, what: str, size: int, seconds: float) -> None:
    """Tell people of copies that were made: `size` bytes."""
    throughput = size / 1e9 / seconds if seconds else 0.0
    logger.info(
        "%s. size: %.4f GB, cost %.4f ms, throughput: %.4f GB/s",
        what,
        size / 1e9,
        seconds * 1e3,
        throughput,
    )
