"""The whole of `lmcache server`: memory, tiers, both ports, and an orderly end."""

from __future__ import annotations

import ctypes
import gc
import ipaddress
import os
import signal
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.core.assembly import GIB, assemble
from lmcache.core.errors import ConfigError
from lmcache.core.log import init_logger
from lmcache.core.metrics import Exporter
from lmcache.core.service.http import HttpServer, build_app
from lmcache.core.service.server import Server
from lmcache.core.service.service import Terms
from lmcache.core.warming import Warmer

if TYPE_CHECKING:
    from lmcache.core.assembly import Offers
    from lmcache.core.config import Config

logger = init_logger(__name__)

KEPT_BYTES = 32 << 20
"""The largest message; so much of each arena may stay with us."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

TRANSFER_MODES = ("engine_driven", "lmcache_driven")


@dataclass(frozen=True)
class Binding:
    """Where to listen, and who may speak."""

    host: str = "127.0.0.1"
    port: int = 5555
    http_host: str = "127.0.0.1"
    http_port: int = 8080
    modes: tuple[str, ...] = TRANSFER_MODES
    token: str = ""
    insecure: bool = False
    """Listen beyond this machine without a token."""
    prefault: bool = True
    """Take all the memory now, in the background, so that no store waits for the kernel."""
    while_stdin: bool = False
    """End when standard input does: with whoever holds its other end."""
    release: str = ""

    def check(self) -> None:
        """Raise `ConfigError` for an open door without a lock."""
        for host in (self.host, self.http_host):
            if not is_loopback(host) and not self.token and not self.insecure:
                raise ConfigError(
                    f"{host} can be reached from other machines: set LMCACHE_TOKEN, "
                    "or say --insecure if the network is to be trusted"
                )

    @property
    def endpoint(self) -> str:
        """The engines' address."""
        host = self.host.removeprefix("tcp://")
        return f"tcp://{f'[{host}]' if ':' in host else host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    name = host.removeprefix("tcp://").strip("[]")
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def serve(config: Config, offers: Offers, binding: Binding) -> None:
    """Serve until SIGTERM or SIGINT. Raises `LMCacheError` for what cannot be set up."""
    binding.check()
    _keep_freed_memory()
    gc.freeze()  # what has been imported stays, and need not be looked at again and again
    with ExitStack() as stack:
        decider, tiers = assemble(config, offers)
        stack.callback(decider.slab.close)
        stack.callback(tiers.close)
        if binding.prefault:
            stack.callback(Warmer(decider.slab, decider.slab.size).close)
        terms = Terms(
            chunk_size=config.chunk_size,
            modes=binding.modes,
            fetch_timeout_s=config.fetch_timeout_ms / 1e3,
            lease_s=float(config.pin_timeout_sec),
            token=binding.token,
            release=binding.release,
        )
        server = Server(decider, tiers, terms, binding.endpoint)
        stack.callback(server.close)
        exporter = Exporter(config.lmcache_instance_id or "server", decider, config.metrics_port)
        stack.callback(exporter.close)
        http = HttpServer(binding.http_host, binding.http_port)
        stack.callback(http.close)
        is_local = is_loopback(binding.http_host)
        http.start(build_app(server, token=binding.token, is_loopback=is_local))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        logger.info(
            "Serving engines at %s, people at http://%s:%d: %.2f GiB, %s, chunks of %d tokens, %s",
            server.endpoint,
            binding.http_host,
            http.port,
            decider.slab.size / GIB,
            decider.policy_name,
            config.chunk_size,
            " or ".join(binding.modes),
        )
        if binding.while_stdin:
            threading.Thread(target=_stop_at_eof, args=(server,), daemon=True).start()
        server.run()
        logger.info("Stopped")


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: for a long prompt the kernel would take longer than we do."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def _stop_at_eof(server: Server) -> None:
    while os.read(0, 4096):
        pass
    server.stop()
