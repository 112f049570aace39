"""Requests to a bucket of S3 or of its like, through obstore, and what their failures mean."""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lmcache.core.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_COPIED = 1 << 20
"""Bytes copied at a time: few enough to be in the processor's cache still."""
_NO_ROOM = {"EntityTooLarge", "QuotaExceeded", "XMinioStorageFull"}
_REPLY = re.compile(r"<Code>([^<]*)</Code>(?:.*?<Message>([^<]*)</Message>)?", re.DOTALL)
_STATUS = re.compile(r"status code: (\d+[^:]*)")
_CAUSE = re.compile(r'\b(?:message|error): "?(\w[^"\n(,{]*)|\b(TimedOut)\b')
"""In what obstore tells of an error's sources."""
_LONGEST = 300


class Replaced(BackendError):
    """The object is no longer the one whose beginning was read."""


class Bucket:
    """One bucket. Any thread may call any method, and no request takes longer than `timeout_s`.

    One that fails at once is made again, twice at the most.
    """

    def __init__(
        self,
        name: str,
        *,
        timeout_s: float,
        endpoint: str | None = None,
        credentials: tuple[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """`settings` are those of obstore, which looks for what is missing where AWS's tools do."""
        self._obstore = _import_obstore()
        self._errors = (self._obstore.exceptions.BaseError, OSError)
        self._label = f"the bucket {name}" + (f" at {endpoint}" if endpoint else "")
        if endpoint:
            settings["endpoint"] = endpoint
        if credentials:
            settings["credential_provider"] = _provider(*credentials)
        timeout = timedelta(seconds=timeout_s)
        try:
            self._store = self._obstore.store.S3Store(
                name,
                client_options={
                    "timeout": timeout,
                    "connect_timeout": timeout,
                    "allow_http": (endpoint or "").startswith("http://"),
                },
                retry_config=_retries(timeout),
                unsigned_payload=True,  # an object has a checksum of its own
                disable_bulk_delete=True,  # which not every store knows
                **settings,
            )
        except self._errors as error:
            raise ConfigError(f"{self._label} cannot be used: {_reason(error)}") from None

    def put(self, name: str, data: memoryview, *, part_size: int, at_once: int) -> bool:
        """Store an object; False if there is no room for it. A large one is sent in parts."""
        parts = [data[n : n + part_size] for n in range(0, data.nbytes, part_size)]
        how = {"use_multipart": True, "chunk_size": part_size, "max_concurrency": at_once}
        with self.told():
            try:
                if len(parts) > 1:
                    self._obstore.put(self._store, name, iter(parts), **how)
                else:
                    self._obstore.put(self._store, name, data, use_multipart=False)
            except self._errors as error:
                if _code(error) in _NO_ROOM:
                    return False
                raise
        return True

    def get(
        self, name: str, span: tuple[int, int] | None = None, tag: str | None = None
    ) -> Answer | None:
        """Ask for an object, or for what it has of `span`; None if there is none.

        With `tag`, raises `Replaced` if its content is another by now.
        """
        options: dict[str, Any] = {}
        if span:
            options["range"] = span
        if tag:
            options["if_match"] = tag
        with self.told():
            try:
                answer = Answer(self, self._obstore.get(self._store, name, options=options))
            except self._errors as error:
                if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket":
                    return None
                if span and _code(error) == "InvalidRange":  # of an object without a byte
                    return self.get(name, tag=tag)
                if _code(error) == "PreconditionFailed":
                    raise Replaced(f"{self._label} has another object meanwhile") from None
                raise
        if tag and answer.tag != tag:  # a store that ignores the question
            raise Replaced(f"{self._label} has another object meanwhile")
        return answer

    def has(self, name: str) -> bool:
        """Whether there is such an object. A bucket that does not exist has none."""
        with self.told():
            try:
                self._obstore.head(self._store, name)
            except FileNotFoundError:
                return False
        return True

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self.told():
            self._obstore.delete(self._store, name)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Whatever the store or obstore has to complain of is a `BackendError`."""
        try:
            yield
        except self._errors as error:
            # not chained: the original repeats the store's whole answer, even a token
            raise BackendError(f"{self._label} failed us: {_reason(error)}") from None


class Answer:
    """An object, or a part of one, on its way to us."""

    def __init__(self, bucket: Bucket, result: Any) -> None:
        self._bucket = bucket
        self._result = result
        self.size: int = result.meta["size"]
        """Of the whole object."""
        self.tag: str | None = result.meta["e_tag"]
        """Which two contents do not share."""

    def read_into(self, out: memoryview) -> None:
        """Fill `out`, which has the length of what was asked for."""
        done = 0
        with self._bucket.told():
            for some in self._result.stream(min_chunk_size=_COPIED):
                out[done : done + len(some)] = some
                done += len(some)
        if done < out.nbytes:
            raise BackendError(f"of {out.nbytes} bytes of an object {done} came")


def _import_obstore() -> Any:
    try:
        import obstore.exceptions
    except ImportError:
        raise ConfigError("S3 needs the package obstore: pip install 'lmcache[s3]'") from None
    return obstore


def _retries(timeout: timedelta) -> dict[str, Any]:
    """Twice, but not after a long wait, or that would be followed by the whole timeout again."""
    pauses = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1)}
    return {"max_retries": 2, "retry_timeout": timeout / 2, "backoff": pauses}


def _provider(key_id: str, secret: str) -> Any:
    return lambda: {"access_key_id": key_id, "secret_access_key": secret, "expires_at": None}


def _code(error: Exception) -> str:
    """What the store calls it, or nothing."""
    said = _REPLY.search(str(error))
    return said[1] if said else ""


def _reason(error: Exception) -> str:
    """What went wrong, without what of an answer may hold a secret."""
    summary, _, details = str(error).partition("\n")
    found = _REPLY.search(str(error)) or _STATUS.search(summary) or _CAUSE.search(details)
    return ": ".join(filter(None, found.groups())) if found else summary[:_LONGEST]
