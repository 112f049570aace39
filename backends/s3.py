"""Objects in a bucket of S3, or of whatever else speaks its protocol."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from lmcache.backends.bucket import Replaced
from lmcache.backends.crew import Crew
from lmcache.backends.s3_url import OPTIONS, PART_SIZE, bucket_of, part_size_of, prefix_of
from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendClosed, BackendError
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from typing_extensions import Self

    from lmcache.backends.bucket import Bucket
    from lmcache.core.keys import ChunkKey

CONCURRENCY = 32
CLOSED = "s3 backend is closed"
_TRIES = 3


class S3Backend(StorageBackend):
    """Keeps each object as one of the bucket's: `prefix/ab/abc...`, the 64 hex digits of its key.

    The two digits in between are for stores that keep a directory for each slash. S3 itself needs
    nothing: it divides a bucket by the first characters that differ, and those of keys are random.

    What is larger than `part_size` is sent and read in parts, `concurrency` of them at once, and
    so many questions does `count_leading` ask at once. An upload that fails is aborted. Parts are
    read of one content only: if another takes its place meanwhile, that one is read.

    Connections are made when they are needed, so the store may come and go.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(persistent=True, shared=True)

    def __init__(
        self,
        bucket: Bucket,
        *,
        prefix: str = "",
        part_size: int = PART_SIZE,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self._bucket: Bucket | None = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._part_size = part_size
        self._concurrency = concurrency
        self._crew = Crew(concurrency, "lmcache-s3")

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `s3://key:secret@bucket/prefix?endpoint=https://host:port&region=...&timeout=5`."""
        parsed = parse_url(url, options=OPTIONS)
        return cls(
            bucket_of(parsed),
            prefix=prefix_of(parsed),
            part_size=part_size_of(parsed),
            concurrency=parsed.count("concurrency") or CONCURRENCY,
        )

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        return self._opened().put(
            self._name(key), _flat(data), part_size=self._part_size, at_once=self._concurrency
        )

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        bucket, name, view = self._opened(), self._name(key), _flat(out)
        for _ in range(_TRIES):
            try:
                return self._read(bucket, name, view)
            except Replaced as replaced:
                last = replaced
        raise last

    def contains(self, key: ChunkKey) -> bool:
        return self._opened().has(self._name(key))

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        bucket = self._opened()
        missing: list[int] = []

        def look(number: int) -> None:
            # a thread may be slow to begin, so that a later gap is known already
            before = min(missing, default=len(keys))
            if number < before and not bucket.has(self._name(keys[number])):
                missing.append(number)

        self._do(partial(look, number) for number in range(len(keys)))
        return min(missing, default=len(keys))

    def remove(self, key: ChunkKey) -> bool:
        bucket, name = self._opened(), self._name(key)
        found = bucket.has(name)
        if found:
            bucket.remove(name)
        return found

    def close(self) -> None:
        self._bucket = None
        self._crew.close()

    def _read(self, bucket: Bucket, name: str, out: memoryview) -> int | None:
        part = self._part_size
        first = bucket.get(name, (0, part) if out.nbytes > part else None)
        if first is None or first.size > out.nbytes:
            return None
        size, tag = first.size, first.tag
        if size > part and tag is None:  # two contents could not be told apart
            raise BackendError("the store gives an object no ETag, without which it is not read")

        def read(start: int, end: int) -> None:
            answer = bucket.get(name, (start, end), tag) if start else first
            if answer is None:
                raise Replaced("an object was removed while it was read")
            answer.read_into(out[start:end])

        # what came in one piece needs no second one, however large it is
        step = part if out.nbytes > part else size
        self._do(partial(read, n, min(n + step, size)) for n in range(0, size, step or 1))
        return size

    def _do(self, jobs: Iterator[Callable[[], None]]) -> None:
        try:
            self._crew.do(jobs)
        except RuntimeError:  # of a crew that was sent home meanwhile
            raise BackendClosed(CLOSED) from None

    def _opened(self) -> Bucket:
        bucket = self._bucket
        if bucket is None:
            raise BackendClosed(CLOSED)
        return bucket

    def _name(self, key: ChunkKey) -> str:
        digits = key.hex()
        return f"{self._prefix}{digits[:2]}/{digits}"


def _flat(view: memoryview) -> memoryview:
    """The bytes of a view of any shape; one of nothing cannot be cast."""
    return view.cast("B") if view.nbytes else memoryview(b"")


@hookimpl
def lmcache_backends() -> Iterable[BackendSpec]:
    yield BackendSpec("s3", S3Backend.from_url, "a bucket of S3 or of its like, shared")
