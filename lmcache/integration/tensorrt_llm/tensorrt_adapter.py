"""TensorRT-LLM imports the classes of its preset `lmcache` from here."""

from lmcache.adapters.trtllm.connector import LMCacheKvConnectorScheduler, LMCacheKvConnectorWorker
from lmcache.installation import check_installation

check_installation()

__all__ = ["LMCacheKvConnectorScheduler", "LMCacheKvConnectorWorker"]
