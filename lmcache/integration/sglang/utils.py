"""SGLang reads the server's address by this function."""

from lmcache.adapters.sglang.settings import load_settings as lmcache_get_config

__all__ = ["lmcache_get_config"]
