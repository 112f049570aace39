"""What `Capabilities` promises is kept, what it does not does not happen, and closed is closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lmcache.core.errors import BackendClosed, Unsupported
from lmcache.testing.backend_suite.tools import blank, got, payload

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend
    from lmcache.core.keys import ChunkKey
    from lmcache.testing.backend_suite.tools import Keys, OpenClient


class PromiseRules:
    """Rules of several clients of one location, at once and one after the other."""

    def test_objects_outlive_their_writer_if_promised(
        self, open_client: OpenClient, keys: Keys
    ) -> None:
        data = payload(8)
        with open_client() as first:
            first.put(keys(), data)
        with open_client() as second:
            want = data if second.capabilities.persistent else None
            assert got(second, keys(), 8) == want

    def test_two_at_once_share_if_promised(self, open_client: OpenClient, keys: Keys) -> None:
        data = payload(8)
        with open_client() as one, open_client() as two:
            one.put(keys(0), data)
            two.put(keys(1), data)
            for other, name in ((two, keys(0)), (one, keys(1))):
                shared = other.capabilities.shared
                assert got(other, name, 8) == (data if shared else None)
                assert not shared or other.contains(name)

    def test_what_one_removes_is_gone_for_all(self, open_client: OpenClient, keys: Keys) -> None:
        with open_client() as one, open_client() as two:
            if not (one.capabilities.shared and one.capabilities.removal):
                return
            one.put(keys(), payload(8))
            assert got(two, keys(), 8) is not None
            assert one.remove(keys()) is True
            assert got(two, keys(), 8) is None
            assert two.contains(keys()) is False
            assert two.remove(keys()) is False

    def test_closing_one_leaves_the_others_open(self, open_client: OpenClient, keys: Keys) -> None:
        data = payload(8)
        with open_client() as other:
            other.put(keys(0), data)
            with open_client() as one:
                one.put(keys(1), data)
            assert got(other, keys(0), 8) == data
            with open_client() as third:
                third.put(keys(2), data)
                assert got(third, keys(2), 8) == data
            other.put(keys(3), data)
            assert got(other, keys(3), 8) == data
            assert got(other, keys(0), 8) == data

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda b, key: b.put(key, payload(8)), id="put"),
            pytest.param(lambda b, key: b.get_into(key, blank(8)), id="get_into"),
            pytest.param(lambda b, key: b.contains(key), id="contains"),
            pytest.param(lambda b, key: b.count_leading([key]), id="count_leading"),
            pytest.param(lambda b, key: b.remove(key), id="remove"),
            pytest.param(lambda b, key: b.discard_damaged(key), id="discard_damaged"),
        ],
    )
    def test_closed_means_closed(
        self,
        open_client: OpenClient,
        keys: Keys,
        call: Callable[[StorageBackend, ChunkKey], object],
        request: pytest.FixtureRequest,
    ) -> None:
        backend = open_client()
        backend.put(keys(), payload(8))
        backend.close()
        # a backend that never removes may say so first
        removes = request.node.callspec.id in ("remove", "discard_damaged")
        unsupported = removes and not backend.capabilities.removal
        with pytest.raises((BackendClosed, Unsupported) if unsupported else BackendClosed):
            call(backend, keys())

    def test_closing_twice_is_harmless(self, open_client: OpenClient) -> None:
        backend = open_client()
        backend.close()
        backend.close()
