"""TensorRT-LLM's own classes, wherever this version keeps them."""

from __future__ import annotations

import tensorrt_llm
from tensorrt_llm import _utils

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ImportError:  # before 1.3
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )

TELLS_OF_CANCELS = hasattr(KvCacheConnectorScheduler, "request_reset")
"""Whether a connector is told of requests that are cancelled; else some just stay away.

Where it is, a request that is cancelled keeps its blocks until its load is over.
"""

FORGETS_STORES = not hasattr(KvCacheConnectorWorker, "register_forward_pass_callable")
"""Whether, of requests that are said to be stored at once, all but the first keep their blocks.

So it is in 1.1, which is too old for that hook.
"""


def rank() -> int:
    """Of this process, or thread, among those that run one engine."""
    return int(tensorrt_llm.mpi_rank())


def from_leader(text: str) -> str:
    """What rank 0 gave here. Every rank must call it, in the same order as all else that is so."""
    return str(_utils.mpi_broadcast(text, 0))


def from_all(text: str) -> list[str]:
    """What every rank gave here, once all have come. Every rank must call it, likewise."""
    return [str(each) for each in _utils.mpi_allgather(text)]


__all__ = [
    "FORGETS_STORES",
    "TELLS_OF_CANCELS",
    "KvCacheConnectorScheduler",
    "KvCacheConnectorWorker",
    "from_all",
    "from_leader",
    "rank",
]
