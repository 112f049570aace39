"""vLLM's own MP connector, and scripts written for LMCache, import these from here."""

from lmcache.adapters.vllm.builtin_mp import mla_enabled
from lmcache.adapters.vllm.live import ENGINE_NAME

__all__ = ["ENGINE_NAME", "mla_enabled"]
