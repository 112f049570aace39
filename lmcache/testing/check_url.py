"""Checks the storage backend at a URL, which may be in use.

pytest -p lmcache.testing.plugin --pyargs lmcache.testing.check_url --lmcache-backend URL
"""

from __future__ import annotations

import pytest

from lmcache.testing.backend_suite import BackendSuite


class TestBackendUrl(BackendSuite):
    """The rules of `BackendSuite`, for the backend of whichever plugin serves the URL."""

    @pytest.fixture
    def url(self, request: pytest.FixtureRequest) -> str:
        url = request.config.getoption("--lmcache-backend", None)
        if not url:
            pytest.fail("needs -p lmcache.testing.plugin --lmcache-backend URL")
        return str(url)
