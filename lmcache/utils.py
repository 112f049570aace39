"""vLLM's own MP connector imports its logger from here."""

from lmcache.core.log import init_logger

__all__ = ["init_logger"]
