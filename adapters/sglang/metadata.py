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


@dataclass
class LMCacheExternalFlow:
    """A request between its lookup and the end of its load, from 0.5.21 on. SGLang's own record."""

    key: Any
    lookup: Any
    total_hit: int | None = None
    local_hit_tokens: int | None = None
    load: Any = None
    anchor_node: Any = None
    anchor_lock: Any = None
    mamba_value: Any = None
    request_mamba_value: Any = None
    allocated_request_mamba_for_load: bool = False
    load_req: Any = None
    free_mamba_after_load: bool = False
    loaded_skip_tokens: int = 0
    released_skip_tokens: int = 0
    prefix_published: bool = False
    load_completed: bool = False
    retire_requested: bool = False
    cancelled: bool = False

    def __post_init__(self) -> None:
        # of a load, the connector is shown the lookup but not the request
        self.lookup.flow = self

    @property
    def promised(self) -> int:
        """Tokens that SGLang counts on when it admits the request; 0 before that."""
        return self.load_req.host_hit_length if self.load_req else 0


@dataclass
class LMCachePendingStore:
    """A store whose slots SGLang keeps locked, from 0.5.21 on. SGLang's own record."""

    operation: Any
    node_id: Any
    lock_params: Any
