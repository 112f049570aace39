"""Starts a server for engines that are to bring their own; it ends with the engine's process."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lmcache.core.errors import ConfigError, ServiceError
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from lmcache.adapters.vllm.mp_options import MpOptions

logger = init_logger(__name__)

GLANCE_S = 0.1


class Autostart:
    """A server of our own, if nobody else's listens where ours would."""

    def __init__(self, options: MpOptions) -> None:
        """Raises `ConfigError` for an address that is not this machine's."""
        where = urlsplit(options.endpoint)
        if where.hostname not in ("localhost", "127.0.0.1") or not where.port:
            raise ConfigError(f"no server can be started at {options.endpoint}, only on loopback")
        self._port: int = where.port
        args = options.autostart_server_args
        self._args = shlex.split(args) if isinstance(args, str) else [str(a) for a in args or ()]
        self._timeout_s = options.autostart_wait_timeout
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Return when a server listens. Raises `ServiceError` if ours does not come up in time."""
        if self._listens():
            return
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "lmcache", "server", "--port", str(self._port)]
            logger.info("Starting a server at port %d: %s", self._port, shlex.join(self._args))
            # it ends when its standard input does: with us, however we end
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [*command, "--while-stdin", *self._args], stdin=subprocess.PIPE
            )
        deadline = time.monotonic() + self._timeout_s
        while not self._listens():
            if self._process.poll() is not None:
                raise ServiceError(f"the server ended with {self._process.returncode}")
            if time.monotonic() > deadline:
                raise ServiceError(f"the server did not listen within {self._timeout_s} s")
            time.sleep(GLANCE_S)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), GLANCE_S).close()
        except OSError:
            return False
        return True
