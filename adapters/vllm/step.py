"""What the scheduling side tells the workers with each step of vLLM.

Plain integers and lists: it is pickled for every step, or handed over by reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from lmcache.core.mover import Move


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


@dataclass
class Step(KVConnectorMetadata):
    """Loads come before the forward pass of the step, stores after it."""

    number: int = 0
    """Answer with this when all is done; 0 if nothing is to be done."""
    loads: list[Copy] = field(default_factory=list)
    stores: list[Copy] = field(default_factory=list)

    def all_loads(self) -> list[Move]:
        """The moves of all loads."""
        return [move for copy in self.loads for move in copy.moves]

    def all_stores(self) -> list[Move]:
        """The moves of all stores."""
        return [move for copy in self.stores for move in copy.moves]
