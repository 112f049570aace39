"""SGLang from 0.5.21 on imports its records of requests from here."""

from lmcache.adapters.sglang.metadata import LMCacheExternalFlow, LMCachePendingStore

__all__ = ["LMCacheExternalFlow", "LMCachePendingStore"]
