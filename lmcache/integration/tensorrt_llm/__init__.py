"""Module paths that TensorRT-LLM imports; the code is elsewhere."""

from lmcache.adapters.trtllm.meeting import destroy_engine

__all__ = ["destroy_engine"]
