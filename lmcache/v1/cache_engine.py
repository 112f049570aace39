"""Scripts written for LMCache import the engine builder from here."""

from lmcache.adapters.vllm.live import LMCacheEngineBuilder

__all__ = ["LMCacheEngineBuilder"]
