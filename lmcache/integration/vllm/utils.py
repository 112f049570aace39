"""Scripts written for LMCache import the engine's name from here."""

from lmcache.adapters.vllm.live import ENGINE_NAME

__all__ = ["ENGINE_NAME"]
