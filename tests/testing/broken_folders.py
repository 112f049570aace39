"""Backends in files that break one rule each, all of them about several processes.

Other processes find them as the plugin that the end of this module is.
"""

from __future__ import annotations

import fcntl
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from broken_backends import BROKEN, Common, breaks

from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendClosed, BackendError
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec
from lmcache.testing.backend_suite.tools import LARGEST


class Folder(StorageBackend):
    """Sound: a file for each object, put there by renaming."""

    capabilities = Capabilities(persistent=True, shared=True)

    def __init__(self, url):
        self._folder = Path(parse_url(url).path)
        self._closed = False

    def _file(self, key):
        if self._closed:
            raise BackendClosed("the folder is closed")
        return self._folder / key.hex()

    def put(self, key, data):
        file = self._file(key)
        new = file.with_suffix(f".{uuid.uuid4().hex}")
        new.write_bytes(data)
        new.replace(file)
        return True

    def get_into(self, key, out):
        try:
            data = self._file(key).read_bytes()
        except FileNotFoundError:
            return None
        if len(data) > out.nbytes:
            return None
        out.cast("B")[: len(data)] = data
        return len(data)

    def contains(self, key):
        return self._file(key).exists()

    def remove(self, key):
        try:
            self._file(key).unlink()
        except FileNotFoundError:
            return False
        return True

    def close(self):
        self._closed = True


@breaks("test_processes_share_if_promised")
class SharesWithinTheProcess(Common):
    capabilities = Capabilities(shared=True)
    everything: ClassVar[dict[bytes, bytes]] = {}
    users: ClassVar[set[int]] = set()

    def __init__(self, url):
        super().__init__()
        self.users.add(id(self))

    def close(self):
        super().close()
        self.users.discard(id(self))
        if not self.users:
            self.everything.clear()


@breaks("test_objects_outlive_a_killed_process_if_promised")
class WritesWhenItIsClosed(Folder):
    capabilities = Capabilities(persistent=True)

    def __init__(self, url):
        super().__init__(url)
        self._new = {}

    def put(self, key, data):
        self._new[self._file(key)] = bytes(data)
        return True

    def get_into(self, key, out):
        data = self._new.get(self._file(key))
        if data is None:
            return super().get_into(key, out)
        if len(data) > out.nbytes:
            return None
        out.cast("B")[: len(data)] = data
        return len(data)

    def contains(self, key):
        return self._file(key) in self._new or super().contains(key)

    def remove(self, key):
        was_new = self._new.pop(self._file(key), None) is not None
        return super().remove(key) or was_new

    def close(self):
        super().close()
        for file, data in self._new.items():
            file.write_bytes(data)
        self._new = {}


@breaks("test_a_killed_put_leaves_all_or_nothing")
class WritesInPlaceUnderALock(Folder):
    """The lock keeps readers away, but it ends with the process that holds it."""

    @contextmanager
    def _locked(self, how):
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, how)
            yield

    def put(self, key, data):
        half = data.nbytes // 2
        with self._locked(fcntl.LOCK_EX), open(self._file(key), "wb", buffering=0) as file:
            data = data.cast("B") if half else data
            file.write(data[:half])
            if data.nbytes == LARGEST:
                time.sleep(0.05)
            file.write(data[half:])
        return True

    def get_into(self, key, out):
        with self._locked(fcntl.LOCK_SH):
            return super().get_into(key, out)


@breaks("test_a_killed_put_leaves_all_or_nothing")
class StaysLocked(Folder):
    """Whoever is killed while writing leaves a lock that nobody opens again."""

    def put(self, key, data):
        lock = self._file(key).with_suffix(".lock")
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            if data.nbytes == LARGEST:
                raise BackendError("another process writes this object") from None
            return super().put(key, data)
        try:
            if data.nbytes == LARGEST:
                time.sleep(0.05)
            return super().put(key, data)
        finally:
            lock.unlink()


FOLDERS = [Folder, *(cls for cls in BROKEN if cls.__module__ == __name__)]


@hookimpl
def lmcache_backends():
    for cls in FOLDERS:
        yield BackendSpec(cls.__name__.lower(), cls, "for tests")
