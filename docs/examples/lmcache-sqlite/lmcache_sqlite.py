"""Objects as rows of an SQLite database, which processes may share."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.core.keys import ChunkKey
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec


class SqliteBackend(StorageBackend):
    """Keeps objects at `sqlite:///path?max_size=1GB`; refuses more than fit the file."""

    capabilities = Capabilities(persistent=True, shared=True)

    def __init__(self, url: str) -> None:
        parsed = parse_url(url, options=("max_size",))
        if parsed.host or not parsed.path:
            raise ConfigError("write sqlite:///path")
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = sqlite3.connect(
            parsed.path, timeout=30, isolation_level=None, check_same_thread=False
        )
        with self._database() as db:
            # durable enough for a cache: a crash may lose objects, never spoil them
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            (page,) = db.execute("PRAGMA page_size").fetchone()
            db.execute(f"PRAGMA max_page_count = {(parsed.size('max_size') or 10**9) // page}")
            db.execute("CREATE TABLE IF NOT EXISTS objects (key BLOB PRIMARY KEY, data BLOB)")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._connection is None:
                raise BackendClosed("the database is closed")
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise BackendError(f"SQLite failed: {error}") from error

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        with self._database() as db:
            try:
                db.execute("INSERT OR REPLACE INTO objects VALUES (?, ?)", (key, data))
            except sqlite3.OperationalError as error:
                if "disk is full" in str(error):
                    return False
                raise
        return True

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        query = "SELECT data FROM objects WHERE key = ? AND length(data) <= ?"
        with self._database() as db:
            row = db.execute(query, (key, out.nbytes)).fetchone()
        if row is None:
            return None
        out.cast("B")[: len(row[0])] = row[0]
        return len(row[0])

    def contains(self, key: ChunkKey) -> bool:
        with self._database() as db:
            return db.execute("SELECT 1 FROM objects WHERE key = ?", (key,)).fetchone() is not None

    def remove(self, key: ChunkKey) -> bool:
        with self._database() as db:
            return db.execute("DELETE FROM objects WHERE key = ?", (key,)).rowcount > 0

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None


@hookimpl
def lmcache_backends() -> Iterable[BackendSpec]:
    yield BackendSpec("sqlite", SqliteBackend, "an SQLite database, which processes may share")
