"""What every benchmark says of the times that it took."""

from __future__ import annotations

import ctypes
import time

import numpy as np


class Plain:
    """One thread that copies bytes between memory in use."""

    def __init__(self, size: int) -> None:
        self._source, self._target = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def copy(self) -> float:
        """Seconds for one copy, made beside the copies it is compared with: speed drifts."""
        begun = time.perf_counter()
        ctypes.memmove(self._target.ctypes.data, self._source.ctypes.data, self._source.nbytes)
        return time.perf_counter() - begun


def spread(values: list[float]) -> dict[str, float]:
    """Count, mean, extremes and percentiles; of nothing, the count alone."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "mean": sum(ordered) / len(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "p50": ordered[(len(ordered) - 1) // 2],
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
    }
