"""SGLang imports its connector to a server from here."""

from lmcache.adapters.sglang.mp_connector import LMCacheMPConnector
from lmcache.installation import check_installation

check_installation()

__all__ = ["LMCacheMPConnector"]
