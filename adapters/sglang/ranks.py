"""What all ranks of a model must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Ranks:
    """The ranks that hold the heads of one model, all of which are asked the same in one order."""

    def __init__(self, size: int, group: Any, device: torch.device) -> None:
        """`group` is torch's, or SGLang's wrapper around it, whose tensors lie on `device`."""
        self._size = size
        self._group = getattr(group, "device_group", group)
        self._device = device

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers. Every rank must ask, whatever happened to it."""
        if self._size == 1:
            return number
        import torch
        from torch.distributed import ReduceOp, all_reduce

        least = torch.tensor([number], dtype=torch.int64, device=self._device)
        all_reduce(least, ReduceOp.MIN, group=self._group)
        return int(least.item())
