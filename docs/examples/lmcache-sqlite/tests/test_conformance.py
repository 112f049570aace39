"""The backend keeps the contract, and its promise to stay within `max_size`."""

import pytest
from lmcache.testing import BackendSuite

from lmcache_sqlite import SqliteBackend


class TestSqlite(BackendSuite):
    @pytest.fixture
    def url(self, tmp_path):
        return f"sqlite://{tmp_path}/kv.db"


def test_a_full_database_refuses(tmp_path):
    data = memoryview(bytes(10_000))
    with SqliteBackend(f"sqlite://{tmp_path}/kv.db?max_size=1MB") as backend:
        stored = [backend.put(bytes([n]) * 32, data) for n in range(200)]
        assert any(stored)
        assert not all(stored)
        assert all(backend.contains(bytes([n]) * 32) is stored[n] for n in range(200))
    assert (tmp_path / "kv.db").stat().st_size <= 1_000_000
