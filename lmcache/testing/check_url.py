"""Checks the storage backend at a URL, which may be in use.

pytest -p lmcache.testing.plugin --pyargs lmcache.testing.check_url --lmcache-backend URL
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lmcache.plugins.manager import PluginManager
from lmcache.testing.backend_suite import BackendSuite

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend


class TestBackendUrl(BackendSuite):
    """The rules of `BackendSuite`, for the backend of whichever plugin serves the URL."""

    @pytest.fixture
    def open_backend(self, request: pytest.FixtureRequest) -> Callable[[], StorageBackend]:
        url = request.config.getoption("--lmcache-backend", None)
        if not url:
            pytest.fail("needs -p lmcache.testing.plugin --lmcache-backend URL")
        plugins = PluginManager()
        return lambda: plugins.open_backend(url)
