"""What other processes see, and what is left of those that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from lmcache.testing.backend_suite.child import content
from lmcache.testing.backend_suite.tools import LARGEST, got

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lmcache.core.backend import StorageBackend
    from lmcache.core.keys import ChunkKey
    from lmcache.testing.backend_suite.tools import Keys, OpenClient
    from lmcache.testing.backend_suite.watch import Watch

MOMENTS = (0.2, 0.5, 0.8)
"""When a process is killed, in parts of the time that a put takes."""
_PROGRAM = "from lmcache.testing.backend_suite.child import main; main()"


class Child:
    """A process with a client of its own at `url`, which puts objects and then waits."""

    def __init__(self, watch: Watch, url: str, *keys: ChunkKey, size: int) -> None:
        self._watch = watch
        # it looks for plugins where we do, wherever pytest has added to that
        path = os.pathsep.join(filter(None, sys.path))
        self._process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 - ours
            [sys.executable, "-c", _PROGRAM],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        asked = {"url": url, "keys": [key.hex() for key in keys], "size": size}
        self._input.write(f"{json.dumps(asked)}\n".encode())
        self._input.flush()

    @property
    def _input(self) -> Any:
        return self._process.stdin

    @property
    def _output(self) -> Any:
        return self._process.stdout

    def hear(self) -> list[bytes]:
        """What it says next: `putting`, or how that ended and how many seconds it took."""
        said: bytes = self._watch("another process", self._output.readline)
        assert said, "the other process ended by itself; its standard error says why"
        return said.split()

    def wait_for_put(self) -> float:
        """Return once its next object is stored; how many seconds that took."""
        assert self.hear() == [b"putting"]
        stored, seconds = self.hear()
        assert stored == b"stored"
        return float(seconds)

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()


class ProcessRules:
    """Rules of persistence and sharing between processes, for backends that promise them."""

    @pytest.fixture
    def start_child(self, url: str | None, watch: Watch) -> Iterator[Callable[..., Child]]:
        """Starts a `Child`, which does not outlive the test."""

        def start(*keys: ChunkKey, size: int) -> Child:
            if url is None:
                pytest.skip("another process needs a URL: override the fixture url")
            child = Child(watch, url, *keys, size=size)
            children.callback(child.kill)
            return child

        with ExitStack() as children:
            yield start

    def test_processes_share_if_promised(
        self, backend: StorageBackend, keys: Keys, start_child: Callable[..., Child]
    ) -> None:
        if not backend.capabilities.shared:
            return
        start_child(keys(), size=5000).wait_for_put()
        assert got(backend, keys(), 5000) == content(keys(), 5000)

    def test_objects_outlive_a_killed_process_if_promised(
        self, open_client: OpenClient, keys: Keys, start_child: Callable[..., Child]
    ) -> None:
        with open_client() as backend:
            if not backend.capabilities.persistent:
                return
        child = start_child(keys(0), keys(1), size=5000)
        child.wait_for_put()
        child.wait_for_put()
        child.kill()
        with open_client() as backend:
            for name in (keys(0), keys(1)):
                assert got(backend, name, 5000) == content(name, 5000)

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_a_killed_put_leaves_all_or_nothing(
        self, backend: StorageBackend, keys: Keys, start_child: Callable[..., Child], moment: float
    ) -> None:
        promises = backend.capabilities
        if not (promises.persistent or promises.shared):
            return
        child = start_child(keys(0), keys(1), size=LARGEST)
        duration_s = child.wait_for_put()
        child.hear()
        time.sleep(moment * duration_s)
        child.kill()
        for name in (keys(0), keys(1)):
            whole = content(name, LARGEST)
            assert got(backend, name, LARGEST) in (None, whole), "a part of an object is left"
            assert backend.put(name, whole) is True
            assert got(backend, name, LARGEST) == whole
