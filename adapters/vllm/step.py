"""What the scheduling side tells the workers with each step of vLLM.

Plain integers and lists: it is pickled for every step, or handed over by reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

if TYPE_CHECKING:
    from lmcache.core.mover import Move


@dataclass(frozen=True)
class StoredEvent:
    """One stored chunk, with the fields vLLM reads from an event."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    lora_name: str | None
    medium: str = "CPU"


@dataclass
class Copy:
    """The moves of one request, in one direction."""

    request_id: str
    moves: list[Move]
    tokens: int
    """Tokens that the moves hold."""
    required: int
    """Tokens they are part of: the hit for a load, what could be stored for a store."""
    total: int
    """Tokens of the request."""
    is_last: bool = True
    """Whether the request waits for no further load."""
    events: list[StoredEvent] = field(default_factory=list)
    """What to tell vLLM's event stream once the copy is made."""


@dataclass
class Step(KVConnectorMetadata):
    """Loads come before the forward pass of the step, stores after it."""

    attachment: int = 0
    """Whose slots these are; a mover of any other attachment has nothing to do with them."""
    number: int = 0
    """Answer with this when all is done; 0 if nothing is to be done."""
    loads: list[Copy] = field(default_factory=list)
    stores: list[Copy] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    """Pages that vLLM has given out anew and that the step may write to, where stores are made
    behind it."""
    lost: list[int] = field(default_factory=list)
    """Pages that vLLM expects to be loaded and that will not be."""
    unloaded: list[str] = field(default_factory=list)
    """Requests that vLLM keeps waiting for a load outside the batch that will not be made, or
    not to its end."""

    is_idle: bool = False
    """Whether vLLM computes nothing in it, so that there is time to wait for loads."""

    def all_loads(self) -> list[Move]:
        """The moves of all loads."""
        return [move for copy in self.loads for move in copy.moves]

    def all_stores(self) -> list[Move]:
        """The moves of all stores."""
        return [move for copy in self.stores for move in copy.moves]
