"""vLLM imports its in-process connector from here."""

from lmcache.adapters.vllm.connector import LMCacheConnectorV1Impl
from lmcache.installation import check_installation

check_installation()

__all__ = ["LMCacheConnectorV1Impl"]
