"""vLLM imports its in-process connector from here."""

from lmcache.adapters.vllm.connector import LMCacheConnectorV1Impl

__all__ = ["LMCacheConnectorV1Impl"]
