"""A GPU for the fake engine: its pages are the host's, but nothing is done before it has to be.

The forward pass is work on a stream, as are all copies, and each stream is as late as waits and
events allow; stores are late on top of that, by the clock.
"""

from __future__ import annotations

import random
import time
from contextlib import contextmanager

import numpy as np
from fake_lazy import LazyDevice

from lmcache.core.kernels.accelerator import AcceleratorPages, BothWays
from lmcache.core.kernels.paths import PATHS
from lmcache.core.kernels.plan import Planner

LATEST_S = 0.003
BUFFER_BYTES = 1 << 10


class AnyPath:
    """Chooses at random."""

    def __init__(self, rng):
        self._rng = rng

    def choose(self, run_bytes, *, to_slab):
        return self._rng.choice(PATHS)


class SomePins:
    """All of a slab is pinned, or nothing is."""

    def __init__(self, slab, rng):
        self._slab, self._rng = slab, rng

    @contextmanager
    def held(self):
        yield np.array([self._slab.size] if self._rng.random() < 0.7 else [], np.int64)


class GpuPages(BothWays):
    """What `CudaPages` is on a real one."""

    def __init__(self, gpu, layout, slab):
        self._gpu = gpu
        gpu.device.planner = planner = Planner(layout)
        super().__init__(
            lambda: AcceleratorPages(
                layout,
                planner,
                gpu.device,
                slab,
                pins=SomePins(slab, gpu.rng),
                paths=AnyPath(gpu.rng),
                buffer_bytes=BUFFER_BYTES,
            )
        )

    def mark(self):
        return self._gpu.stream.record()

    def stay_near(self):
        """It is everywhere."""

    def copy(self, spans, region, *, to_slab, after=None):
        if to_slab and self._gpu.rng.random() < 0.5:
            time.sleep(self._gpu.rng.random() * LATEST_S)
        return super().copy(spans, region, to_slab=to_slab, after=after)


class Gpu:
    """One device, with the stream on which the engine computes."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.device = LazyDevice(None, seed)
        self.stream = self.device.stream()

    def copier_for(self, layout, slab, tensors, places=()):
        """In place of the core's."""
        return GpuPages(self, layout, slab)
