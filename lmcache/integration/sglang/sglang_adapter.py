"""SGLang imports its in-process connector from here."""

from lmcache.adapters.sglang.connector import LMCacheLayerwiseConnector
from lmcache.adapters.sglang.metadata import LoadMetadata, StoreMetadata
from lmcache.installation import check_installation

check_installation()

__all__ = ["LMCacheLayerwiseConnector", "LoadMetadata", "StoreMetadata"]
