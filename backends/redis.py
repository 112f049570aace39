"""Objects in Redis, Valkey or whatever else speaks their protocol."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.environment import environment_text
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Self

    from lmcache.core.keys import ChunkKey
    from lmcache.core.urls import Url

PREFIX = "lmcache:"
TIMEOUT_S = 5.0
LARGEST = 512 << 20
"""What the servers take by default; a longer value would cost us the connection."""
_AT_ONCE = 1024
"""Questions in one round trip."""
_PASSWORD = "LMCACHE_REDIS_PASSWORD"


class RedisBackend(StorageBackend):
    """Keeps each object as one value, at `prefix` and the 64 hex digits of its key.

    How much there is room for is the server's own affair: give it a `maxmemory`, and
    `maxmemory-policy allkeys-lru` or the like. A full server that may not evict is a refusal, as is
    an object of more than 512 MiB. With `ttl_s`, what nobody has read for so many seconds goes.

    Connections are made when they are needed, so the server may come and go. No step of a call, of
    which there are a few, waits for it longer than `timeout_s`.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(persistent=True, shared=True)

    def __init__(
        self,
        address: dict[str, Any],
        *,
        cluster: bool = False,
        prefix: str = PREFIX,
        ttl_s: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`address` is what redis-py takes: `host`, `port`, `db`, `username`, `ssl` and so on."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError(
                "Redis and Valkey need the package redis: pip install 'lmcache[redis]'"
            ) from None
        self._connect = redis.RedisCluster if cluster else redis.Redis
        self._options = {
            **address,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            # once more for a connection that has died since it was last used, and no more than that
            "retry": Retry(NoBackoff(), 1, (redis.exceptions.ConnectionError,)),
        }
        self._prefix = prefix.encode()
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._client: Any = None
        self._closed = False

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `redis://user:password@host:port/db?prefix=...&ttl=3600&timeout=5&cluster=true`."""
        parsed = parse_url(url, options=("cluster", "prefix", "timeout", "ttl"))
        return cls(
            _address(parsed),
            cluster=parsed.flag("cluster"),
            prefix=parsed.options.get("prefix", PREFIX),
            ttl_s=parsed.count("ttl"),
            timeout_s=parsed.count("timeout") or TIMEOUT_S,
        )

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        from redis.exceptions import OutOfMemoryError

        if data.nbytes > LARGEST:
            return False
        with self._connected() as client:
            try:
                value = data.cast("B") if data.nbytes else b""
                return bool(client.set(self._name(key), value, ex=self._ttl_s))
            except OutOfMemoryError:
                return False

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        with self._connected() as client:
            name = self._name(key)
            data = client.getex(name, ex=self._ttl_s) if self._ttl_s else client.get(name)
        if data is None or len(data) > out.nbytes:
            return None
        if data:
            out.cast("B")[: len(data)] = data
        return len(data)

    def contains(self, key: ChunkKey) -> bool:
        return self.count_leading([key]) == 1

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        found = 0
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            with self._connected() as client, client.pipeline(transaction=False) as questions:
                for key in some:
                    questions.exists(self._name(key))
                here = sum(1 for _ in takewhile(bool, questions.execute()))
            found += here
            if here < len(some):
                break
        return found

    def remove(self, key: ChunkKey) -> bool:
        with self._connected() as client:
            return bool(client.unlink(self._name(key)))

    def close(self) -> None:
        with self._lock:
            client, self._client, self._closed = self._client, None, True
        if client is not None:
            client.close()

    def _name(self, key: ChunkKey) -> bytes:
        return self._prefix + key.hex().encode()

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """The client, whose errors are ours."""
        from redis.exceptions import RedisClusterException, RedisError

        try:
            with self._lock:
                if self._closed:
                    raise BackendClosed("redis backend is closed")
                if self._client is None:  # only now: that of a cluster asks at once who is in it
                    self._client = self._connect(**self._options)
                client = self._client
            yield client
        except (RedisError, RedisClusterException, OSError) as error:
            where = f"{self._options['host']}:{self._options['port']}"
            raise BackendError(f"the server at {where} failed us: {error}") from error


def _address(url: Url) -> dict[str, Any]:
    database = url.path.strip("/")
    if not url.host or not (database or "0").isdigit():
        raise ConfigError(f"write {url.scheme}://host:port/number-of-the-database")
    address: dict[str, Any] = {"host": url.host, "port": url.port or 6379}
    if database:
        address["db"] = int(database)
    password = url.password or environment_text(_PASSWORD)
    if url.username:
        address["username"] = url.username
    if password:
        address["password"] = password
    if url.scheme in ("rediss", "valkeys"):
        address["ssl"] = True
    return address


@hookimpl
def lmcache_backends() -> Iterable[BackendSpec]:
    for scheme, what in (("redis", "Redis"), ("valkey", "Valkey")):
        yield BackendSpec(scheme, RedisBackend.from_url, f"a {what} server or cluster, shared")
        yield BackendSpec(f"{scheme}s", RedisBackend.from_url, f"{what} over TLS")
