"""Pages into one buffer and back, both on one device: for tools, tests and adapters.

An engine's own copies go through a `Mover`, which chooses its path by measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lmcache.core.kernels.host import HostCopier
from lmcache.core.kernels.plan import Planner, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.layout import PageLayout


def gather(layout: PageLayout, pages: Sequence[int], target: torch.Tensor) -> None:
    """Copy `pages` into `target`, in the order of an object of theirs.

    `target` lies where the pages do, and is contiguous uint8 of `len(pages) * layout.page_bytes`.
    On a GPU it is done when the current stream is. Raises `ValueError` for another tensor,
    `IndexError` for pages that are not there.
    """
    _copy(layout, pages, target, to_stored=True)


def scatter(layout: PageLayout, pages: Sequence[int], source: torch.Tensor) -> None:
    """Copy an object of `pages` from `source` to where they are, likewise."""
    _copy(layout, pages, source, to_stored=False)


def serving_path() -> str:
    """What these operations copy with on this machine; an engine's own copies are a mover's."""
    if torch.cuda.is_available():
        import triton

        return f"Triton {triton.__version__} on {torch.cuda.get_device_name()}"
    return "memmove on the host"


def _copy(
    layout: PageLayout, pages: Sequence[int], stored: torch.Tensor, *, to_stored: bool
) -> None:
    size = len(pages) * layout.page_bytes
    if stored.dtype != torch.uint8 or not stored.is_contiguous() or stored.numel() != size:
        raise ValueError(
            f"a tensor of {stored.numel()} {stored.dtype} where {size} contiguous bytes are wanted"
        )
    planner = Planner(layout)
    spans = [Span(stored.data_ptr(), len(pages), 0, pages)]
    if stored.device.type == "cpu":
        runs = planner.plan(spans)
        ends = (runs.stored, runs.engine) if to_stored else (runs.engine, runs.stored)
        copier = HostCopier(1)
        copier.copy(*ends, runs.length)
        copier.close()
        return
    from lmcache.core.kernels.paged import PagedKernel

    table = planner.pages(spans)
    for shape in planner.shapes:
        PagedKernel(shape, stored.device).launch(table, to_stored=to_stored)
