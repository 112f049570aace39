"""vLLM imports its multi-process connector from here."""

from lmcache.adapters.vllm.mp_connector import LMCacheMPConnector
from lmcache.installation import check_installation

check_installation()

__all__ = ["LMCacheMPConnector"]
