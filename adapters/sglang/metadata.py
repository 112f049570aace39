"""What SGLang says of a load and of a store; it makes these by keyword."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass
class LoadMetadata:
    """Pages that SGLang has made room for."""

    token_ids: Sequence[int]
    """Whole pages of the prompt, what SGLang has itself included. May be SGLang's own, and grow."""
    slot_mapping: torch.Tensor
    """Where in the pool each of them is to lie; -1 for those that SGLang has."""
    offset: int
    """How many tokens SGLang has, rounded down to a chunk."""
    prefix_pad: int = 0
    """How many it has beyond `offset`."""
    request_id: str = ""


@dataclass
class StoreMetadata:
    """Pages of a request that has ended."""

    last_node: Any
    """SGLang's own."""
    token_ids: Sequence[int]
    """The prompt and what was generated. The last one may still be computed."""
    kv_indices: torch.Tensor
    """Where in the pool they lie; SGLang's own memory, used again soon."""
    offset: int
    request_id: str = ""
