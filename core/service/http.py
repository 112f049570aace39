"""HTTP for people and orchestrators: health, metrics, what is held and why, clearing.

Nothing an engine needs is here, and nothing here can hold up an engine for longer than a look.
"""

from __future__ import annotations

import hmac
import json
import socket
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from lmcache.core.errors import ServiceError
from lmcache.core.service import views

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lmcache.core.service.server import Server
    from lmcache.core.service.service import Service

LOOK_S = 2.0
"""How long a request waits for the thread that serves the engines."""
BODY_BYTES = 16 << 20
"""What a request may be at most: a prompt of a million tokens, generously spaced."""
MAX_OPEN = 100
"""Connections and requests at a time; more are answered 503."""
OPEN_PATHS = ("/healthcheck", "/readyz")
"""What nobody needs a token for."""
_TOO_LONG = 413
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1", "["]
"""The last is all that older releases of Starlette see of an IPv6 address."""


class Prompt(BaseModel):
    """A prompt whose chunks are to be looked for."""

    model_config = ConfigDict(extra="forbid")

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 32)]] = Field(max_length=1 << 20)
    engine: str = Field(default="", max_length=512, description="Name of an attached engine.")
    lora: str = Field(default="", max_length=4096)
    salt: str = Field(default="", max_length=4096)


class Clearing(BaseModel):
    """What is to be cleared. A body is needed, so that no web page can have a browser send it."""

    model_config = ConfigDict(extra="forbid")

    tier: str = Field(default="l1", pattern="^l1$", description="Only the memory can be cleared.")


def build_app(server: Server, *, token: str, is_loopback: bool) -> FastAPI:
    """The application. With a token, all but the health checks must show it."""
    app = FastAPI(title="LMCache", version=server.service.terms.release)
    app.add_exception_handler(RequestValidationError, _name_mistakes)

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = _refusal(request, token)
        if refusal is None:
            return await go_on(request)
        if refusal.status_code != _TOO_LONG:
            with suppress(ClientDisconnect):  # who is still sending would never see an answer
                async for _ in request.stream():
                    pass
        return refusal

    if is_loopback:  # or a web page could reach us under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)
    app.include_router(_health(server))
    app.include_router(_views(server))
    return app


def _refusal(request: Request, token: str) -> Response | None:
    """What is answered to a request that is not even parsed; None if it is."""
    headers = request.headers
    if token and request.url.path not in OPEN_PATHS:
        # a header's text stands for bytes, and those of a token are UTF-8
        shown = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if not hmac.compare_digest(shown, token.encode()):
            return JSONResponse({"detail": "this server wants its token as a bearer"}, 401)
    if request.method == "POST":
        # FastAPI before 0.132 takes what names no type for JSON, and any web page can send that
        if not headers.get("content-type", "").startswith("application/json"):
            return JSONResponse({"detail": "the content-type must be application/json"}, 415)
        if int(headers.get("content-length", BODY_BYTES + 1)) > BODY_BYTES:
            why = f"the content-length must be given, and at most {BODY_BYTES}"
            return JSONResponse({"detail": why}, _TOO_LONG)
    return None


async def _name_mistakes(_: Request, error: Exception) -> Response:
    """The first mistakes, without what was sent: it may be long, and no text or no number."""
    assert isinstance(error, RequestValidationError)
    wrong = [{key: mistake[key] for key in ("type", "loc", "msg")} for mistake in error.errors()]
    return Response(json.dumps({"detail": wrong[:8]}), 422, media_type="application/json")


async def _ask(server: Server, function: Callable[[Service], Any]) -> Any:
    try:
        return await run_in_threadpool(server.ask, function, LOOK_S)
    except TimeoutError:
        raise HTTPException(503, "the server is busy") from None
    except ServiceError as error:
        raise HTTPException(404, str(error)) from None


def _health(server: Server) -> APIRouter:
    router = APIRouter()

    @router.get("/healthcheck")
    async def healthcheck() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "healthy"}

    @router.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether engines are served."""
        await _ask(server, views.boot)
        return {"status": "ready"}

    return router


def _views(server: Server) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters and levels, for Prometheus."""
        text = await run_in_threadpool(generate_latest)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @router.get("/status")
    async def status() -> Any:
        """The server, its memory, its tiers and its engines."""
        return await _ask(server, views.status)

    @router.get("/leases")
    async def leases() -> Any:
        """Every lease, who holds it and for how long."""
        return await _ask(server, views.leases)

    @router.post("/lookup")
    async def lookup(prompt: Prompt) -> Any:
        """Where the chunks of a prompt are, and why the first that is missing is."""
        look = partial(
            views.lookup,
            tokens=prompt.tokens,
            engine=prompt.engine,
            lora=prompt.lora,
            salt=prompt.salt,
        )
        return await _ask(server, look)

    @router.post("/clear")
    async def clear(what: Clearing) -> Any:
        """Drop every chunk of the memory that nobody holds."""
        return await _ask(server, partial(views.clear, tier=what.tier))

    return router


class HttpServer:
    """The application on a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Take the port. Raises `ServiceError` if that cannot be."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen()  # who comes before `start` waits, and is not turned away
        except OSError as error:
            self._socket.close()
            raise ServiceError(f"cannot listen on {host}:{port}: {error}") from error
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, app: FastAPI) -> None:
        """Answer from now on."""
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", limit_concurrency=MAX_OPEN + 1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="lmcache-http"
        )
        self._thread.daemon = True
        self._thread.start()

    def close(self) -> None:
        """Finish what is being answered, and stop."""
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join(LOOK_S)
        self._socket.close()
