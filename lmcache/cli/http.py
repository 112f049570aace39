"""HTTP with a server or an engine that runs: every request has a deadline, every failure a line."""

from __future__ import annotations

import re
import time
from enum import Enum
from http.client import HTTPException
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

import msgspec
import typer

from lmcache.core.environment import environment_text
from lmcache.core.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from http.client import HTTPResponse

Answer = TypeVar("Answer")

DEADLINE_S = 10.0
"""How long a request may take."""
MOST_BYTES = 64 << 20
"""What an answer may be at most."""


class Target(str, Enum):
    """What a command may speak to."""

    KVCACHE = "kvcache"
    ENGINE = "engine"


TargetArgument = Annotated[Target, typer.Argument(help="A cache server, or an engine (vLLM).")]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="Where it listens; by default port 8080, an engine's 8000."),
]

_NO_TOKEN = 401
_MOST_DETAIL = 16_384
_DEFAULT_URLS = {Target.KVCACHE: "http://localhost:8080", Target.ENGINE: "http://localhost:8000"}


class Remote:
    """A server or an engine at a URL. A server is shown the token of `LMCACHE_TOKEN`."""

    def __init__(self, target: Target, url: str | None) -> None:
        """Without a URL it is the default one. Raises `ConfigError` for what cannot be used."""
        self.url = _checked(url or _DEFAULT_URLS[target])
        # the token is a secret between us and our server, whatever else listens elsewhere
        self._is_ours = target is Target.KVCACHE
        self._token = environment_text("LMCACHE_TOKEN") if self._is_ours else ""
        if re.search(r"[\x00-\x1f\x7f]", self._token):
            raise ConfigError("LMCACHE_TOKEN has a control character, which HTTP cannot carry")

    def check(self, path: str) -> None:
        """Raise `ServiceError` unless `path` is answered with success."""
        self._send(path, None)

    def ask(self, path: str, kind: type[Answer], body: object = None) -> Answer:
        """What `path` answers; a body is posted. Raises `ServiceError` if that is of no use."""
        data = self._send(path, None if body is None else msgspec.json.encode(body))
        try:
            return msgspec.json.decode(data, type=kind)
        except ValueError as error:
            why = f"{self.url}{path} does not answer as it should, is this the right port? {error}"
            raise ServiceError(why) from error

    def _send(self, path: str, body: bytes | None) -> bytes:
        url, deadline = self.url + path, time.monotonic() + DEADLINE_S
        try:
            request = Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 - checked
            if self._token:
                # a header's text stands for bytes, and those of the token are UTF-8
                shown = self._token.encode().decode("latin-1")
                request.add_header("Authorization", f"Bearer {shown}")
            with _opener().open(request, timeout=DEADLINE_S) as answer:
                return _read(answer, deadline)
        except HTTPError as error:
            hint = ": set LMCACHE_TOKEN to it" if self._is_ours and error.code == _NO_TOKEN else ""
            with error:
                said = f"{url} answers {error.code}: {_detail(error)}{hint}"
            raise ServiceError(said) from error
        except (OSError, HTTPException, ValueError) as error:
            raise ServiceError(_failure(url, error)) from error


def _checked(url: str) -> str:
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        is_plain = parts.port != 0 and not (parts.username or parts.query or parts.fragment)
    except ValueError:
        is_plain = False
    if not (is_plain and parts.scheme in ("http", "https") and parts.hostname):
        raise ConfigError(f"--url is {url!r}, expected one like http://localhost:8080")
    return full.rstrip("/")


def _opener() -> OpenerDirector:
    """Neither proxies nor redirections: the token goes to the URL that was given, or nowhere."""
    opener = OpenerDirector()
    for handler in (HTTPHandler, HTTPSHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    return opener


def _read(answer: HTTPResponse, deadline: float) -> bytes:
    data = bytearray()
    while part := answer.read1(1 << 16):
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > MOST_BYTES:
            raise ValueError(f"its answer is longer than {MOST_BYTES} bytes")
    return bytes(data)


def _failure(url: str, error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ConnectionRefusedError):
        return f"nothing listens at {url}"
    if isinstance(reason, TimeoutError):
        return f"{url} does not answer within {DEADLINE_S:g} seconds"
    return f"cannot reach {url}: {reason}"


def _detail(error: HTTPError) -> str:
    """What the server says went wrong."""
    try:
        text = error.read(_MOST_DETAIL).decode(errors="replace")
    except (OSError, HTTPException):
        text = ""
    try:
        said: Any = msgspec.json.decode(text)
    except ValueError:
        said = text
    match said:
        case {"detail": [{"loc": [*_, where], "msg": str(what)}, *_]}:
            text = f"{where}: {what}"
        case {"detail": str(what)} | {"error": {"message": str(what)}} | {"error": str(what)}:
            text = what
    return text.strip() or str(error.reason)
