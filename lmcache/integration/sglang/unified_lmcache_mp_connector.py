"""SGLang from 0.5.21 on imports its connector from here."""

from lmcache.adapters.sglang.unified import UnifiedLMCacheMPConnector
from lmcache.installation import check_installation

check_installation()

__all__ = ["UnifiedLMCacheMPConnector"]
