"""What the author of a backend subclasses."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

import pytest

from lmcache.core.assembly import open_tier
from lmcache.plugins.manager import PluginManager
from lmcache.testing.backend_suite.history import HistoryRules
from lmcache.testing.backend_suite.names import NameRules
from lmcache.testing.backend_suite.objects import ObjectRules
from lmcache.testing.backend_suite.processes import ProcessRules
from lmcache.testing.backend_suite.promises import PromiseRules
from lmcache.testing.backend_suite.threads import ThreadRules
from lmcache.testing.backend_suite.tools import Keys
from lmcache.testing.backend_suite.watch import Watch, Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lmcache.core.backend import StorageBackend
    from lmcache.testing.backend_suite.tools import OpenClient


class BackendSuite(ObjectRules, NameRules, PromiseRules, ThreadRules, ProcessRules, HistoryRules):
    """Subclass, provide `url` or `open_backend`, and every rule is checked.

    With `open_backend` alone, the rules about other processes are skipped where they would apply:
    only a URL tells another process what to open. Needs room for some 50 MB. What it stored it
    removes again where the backend can.
    """

    deadline_s: ClassVar[float] = 60
    """How long a call may take; one that takes longer fails the rule, which names it."""

    @pytest.fixture
    def url(self) -> str | None:
        """The location, if plugins know how to open it, in this process and in others."""
        return None

    @pytest.fixture
    def open_backend(self, url: str | None) -> Callable[[], StorageBackend]:
        """Opens the same location each time it is called."""
        if url is None:
            raise NotImplementedError("override the fixture url, or open_backend")
        plugins = PluginManager()
        return lambda: open_tier(url, plugins).backend

    @pytest.fixture
    def watch(self) -> Watch:
        return Watch(self.deadline_s)

    @pytest.fixture
    def open_client(self, open_backend: Callable[[], StorageBackend], watch: Watch) -> OpenClient:
        """`open_backend`, of which no call hangs, nor any of what it opens."""
        return lambda: Watched(watch("opening", open_backend), watch)

    @pytest.fixture
    def keys(self, open_client: OpenClient) -> Iterator[Keys]:
        keys = Keys()
        yield keys
        with open_client() as backend:
            promises = backend.capabilities
            if promises.removal and (promises.persistent or promises.shared):
                for key in keys.made:
                    backend.remove(key)

    @pytest.fixture
    def backend(self, open_client: OpenClient, keys: Keys) -> Iterator[StorageBackend]:
        with open_client() as backend:
            yield backend

    def test_the_suite_is_whole(self) -> None:
        """A rule may be marked xfail with a reason; it may not be replaced."""
        for name, rule in inspect.getmembers(BackendSuite, inspect.isfunction):
            mine = getattr(type(self), name)
            if not name.startswith("test_") or mine is rule:
                continue
            marks = getattr(mine, "pytestmark", [])
            assert any(m.name == "xfail" and m.kwargs.get("reason") for m in marks), (
                f"{name} is replaced; mark it xfail(reason=...) instead"
            )


__all__ = ["BackendSuite"]
