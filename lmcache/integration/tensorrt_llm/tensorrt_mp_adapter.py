"""TensorRT-LLM imports the classes of its preset `lmcache-mp` from here."""

from lmcache.adapters.trtllm.mp_connector import (
    LMCacheMPKvConnectorScheduler,
    LMCacheMPKvConnectorWorker,
)
from lmcache.installation import check_installation

check_installation()

__all__ = ["LMCacheMPKvConnectorScheduler", "LMCacheMPKvConnectorWorker"]
