"""vLLM's own MP connector imports this before it hands over to ours."""

from lmcache.adapters.vllm.builtin_mp import BlockAllocationRecord

__all__ = ["BlockAllocationRecord"]
