"""Objects in Redis, Valkey or whatever else speaks their protocol."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
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
CLOSED = "redis backend is closed"
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
        self._cluster = cluster
        self._connect = redis.RedisCluster if cluster else redis.Redis
        self._options = {
            **address,
            "protocol": 2,  # which all of them speak
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
        address, cluster = _address(parsed), parsed.flag("cluster")
        if cluster and address.pop("db", 0):
            raise ConfigError("a cluster has no databases with numbers")
        return cls(
            address,
            cluster=cluster,
            prefix=parsed.options.get("prefix", PREFIX),
            ttl_s=parsed.count("ttl"),
            timeout_s=parsed.count("timeout") or TIMEOUT_S,
        )

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        from redis.exceptions import OutOfMemoryError

        if data.nbytes > LARGEST:
            return False
        value = data.cast("B") if data.nbytes else b""
        with self._connected() as client:
            try:
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
        with self._connected() as client:
            return bool(client.exists(self._name(key)))

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        exist = _exist_in_cluster if self._cluster else _exist
        names = [self._name(key) for key in keys]
        found = 0
        with self._connected() as client:
            for start in range(0, len(names), _AT_ONCE):
                some = names[start : start + _AT_ONCE]
                here = sum(1 for _ in takewhile(bool, exist(client, some)))
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
            with suppress(RuntimeError):  # of a cluster, while others still use it
                client.close()

    def _name(self, key: ChunkKey) -> bytes:
        return self._prefix + key.hex().encode()

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """The client, whose errors are ours."""
        from redis.exceptions import RedisClusterException

        try:
            yield self._open()
        except BackendClosed:
            raise
        except Exception as error:  # also what its library makes of being closed under a call
            if self._closed:
                raise BackendClosed(CLOSED) from error
            if isinstance(error, RedisClusterException):
                self._leave()
            what, host = ("cluster", "server")[not self._cluster], self._options["host"]
            where = f"[{host}]" if ":" in host else host
            port = self._options["port"]
            raise BackendError(f"the {what} at {where}:{port} failed us: {error}") from error

    def _open(self) -> Any:
        """The client; that of a cluster asks at once who is in it, and may wait for an answer."""
        with self._lock:
            if self._closed:
                raise BackendClosed(CLOSED)
            if self._client is not None:
                return self._client
        return self._install(self._connect(**self._options))

    def _install(self, made: Any) -> Any:
        """Use `made`, unless somebody else was faster or has closed us."""
        with self._lock:
            if self._client is None and not self._closed:
                self._client = made
            client = self._client
        if client is not made:
            made.close()
        if client is None:
            raise BackendClosed(CLOSED)
        return client

    def _leave(self) -> None:
        """No server of the cluster answers any more: the next call asks again where they are."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            with suppress(RuntimeError):
                client.close()


def _exist(client: Any, names: Sequence[bytes]) -> list[Any]:
    with client.pipeline(transaction=False) as questions:
        for name in names:
            questions.exists(name)
        answers: list[Any] = questions.execute()
    return answers


def _exist_in_cluster(client: Any, names: Sequence[bytes]) -> list[Any]:
    """Asks each server once; redis-py's own pipeline asks one that hangs about every name."""
    from redis.exceptions import ConnectionError as Gone
    from redis.exceptions import ResponseError
    from redis.exceptions import TimeoutError as Late

    at: dict[Any, list[bytes]] = defaultdict(list)
    for name in names:
        at[client.get_node_from_key(name)].append(name)
    found: dict[bytes, Any] = {}
    for node, theirs in at.items():
        with client.get_redis_connection(node).pipeline(transaction=False) as questions:
            for name in theirs:
                questions.exists(name)
            try:
                answers = questions.execute(raise_on_error=False)
            except (Gone, Late):
                client.exists(theirs[0])  # which has it look who is there instead
                raise
        for name, answer in zip(theirs, answers, strict=True):
            has_moved = isinstance(answer, ResponseError)
            found[name] = client.exists(name) if has_moved else answer
    return [found[name] for name in names]


def _address(url: Url) -> dict[str, Any]:
    database = url.path.strip("/")
    if not url.host or url.port == 0 or not (database or "0").isdecimal():
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
