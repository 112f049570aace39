"""Objects in another order than the engine's, so that one engine can use what another stored.

A page of a region is made of rows: one head's K, or V, for one token. An order names what they are
counted by, from the outermost to the innermost:

* `("kv", "token", "head")` and `("kv", "head", "token")`: K and V apart, NHD and HND
* `("token", "head", "kv")` and `("head", "token", "kv")`: K and V side by side, NHD and HND

Nothing is converted unless somebody asks for it: an object keeps the order of its engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lmcache.core.errors import LayoutError

if TYPE_CHECKING:
    from lmcache.core.kernels.plan import Shape

Order = tuple[str, str, str]


@dataclass(frozen=True)
class Rows:
    """What a page of one region holds."""

    kv: int
    """2, or 1 where K and V are one latent."""
    head: int
    token: int
    row_bytes: int

    def count(self, axis: str) -> int:
        """How many there are along one axis of an order."""
        counts = {"kv": self.kv, "head": self.head, "token": self.token}
        return counts[axis]


def reordered(shape: Shape, rows: Rows, source: Order, target: Order) -> Shape:
    """Regions in the order `source`, of which objects are to be in the order `target`.

    Raises `LayoutError` if their pages are not made of such rows.
    """
    for order in (source, target):
        if sorted(order) != ["head", "kv", "token"]:
            raise LayoutError(f"{order} is no order of kv, head and token")
    page_bytes = shape.run_bytes * shape.offsets.shape[1]
    if rows.kv * rows.head * rows.token * rows.row_bytes != page_bytes:
        raise LayoutError(f"{rows} are not the {page_bytes} bytes of a page")
    same = 0  # what both count innermost stays together
    while same < len(source) and source[-1 - same] == target[-1 - same]:
        same += 1
    moved = source[: len(source) - same]
    unit = rows.row_bytes * prod(rows.count(axis) for axis in source[len(moved) :])
    if shape.run_bytes % unit:
        raise LayoutError(f"runs of {shape.run_bytes} bytes cut rows of {unit} apart")
    inner = np.arange(0, shape.run_bytes, unit, dtype=np.int64)
    offsets = (shape.offsets[:, :, None] + inner).reshape(len(shape.offsets), -1)
    numbered = np.arange(offsets.shape[1]).reshape([rows.count(axis) for axis in moved])
    read = numbered.transpose([moved.index(axis) for axis in target[: len(moved)]]).ravel()
    places = np.empty(len(read), np.int64)
    places[read] = np.arange(len(read)) * unit
    return shape.with_runs(offsets, np.tile(places, (len(offsets), 1)), unit)
