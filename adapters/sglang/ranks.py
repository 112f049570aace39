"""What all ranks of a model must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Ranks:
    """Ranks that are asked the same in one order, e.g. those that hold the heads of one model."""

    def __init__(self, size: int, group: Any, device: torch.device | None = None) -> None:
        """`group` is torch's, or SGLang's wrapper around it; its tensors lie on `device`."""
        self._size = size
        self._group = getattr(group, "device_group", group)
        self._device = device

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers. Every rank must ask, whatever happened to it."""
        if self._size == 1:
            return number
        import torch
        from torch.distributed import ReduceOp

        least = torch.tensor([number], dtype=torch.int64, device=self._device)
        self.reduce(least, ReduceOp.MIN)
        return int(least.item())

    def reduce(self, tensor: torch.Tensor, op: Any) -> None:
        """Reduce a tensor over all ranks, in place."""
        if self._size > 1:
            from torch.distributed import all_reduce

            all_reduce(tensor, op, group=self._group)
