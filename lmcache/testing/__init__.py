"""What the author of a storage backend or an eviction policy needs to prove that it behaves.

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
    "lmcache.testing.eviction_suite",
)

from lmcache.testing.backend_suite import BackendStateMachine, BackendSuite  # noqa: E402
from lmcache.testing.eviction_suite import EvictionPolicySuite  # noqa: E402

__all__ = ["BackendStateMachine", "BackendSuite", "EvictionPolicySuite"]
