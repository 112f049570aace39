"""What authors of storage backends, eviction policies and codecs need to prove that they behave.

    from lmcache.testing import BackendSuite

    class TestRedis(BackendSuite):
        @pytest.fixture
        def url(self, redis_server):
            return redis_server.url

`faults` has backends that fail, dawdle or corrupt, to test what is built on a backend.
"""

from __future__ import annotations

import pytest

# before the import, or a failure elsewhere reads "AssertionError" and nothing else
pytest.register_assert_rewrite(
    "lmcache.testing.backend_suite",
    "lmcache.testing.codec_suite",
    "lmcache.testing.eviction_suite",
)

from lmcache.testing.backend_suite import BackendStateMachine, BackendSuite  # noqa: E402
from lmcache.testing.codec_suite import CodecSuite  # noqa: E402
from lmcache.testing.eviction_suite import EvictionPolicySuite  # noqa: E402

__all__ = ["BackendStateMachine", "BackendSuite", "CodecSuite", "EvictionPolicySuite"]
