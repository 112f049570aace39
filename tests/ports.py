"""Ports for servers that are told where to listen."""

from __future__ import annotations

import random
import socket

LOWEST, HIGHEST = 10_000, 22_000
"""Below those that the system gives to whoever connects: a server that is half a minute in the
coming would find its port taken by such a connection. A cluster's Redis talks at a port that is
10,000 higher, which is below them too."""


def free_port() -> int:
    """A port that nobody has at the moment; those that are asked for in turn rarely agree."""
    while True:
        port = random.randrange(LOWEST, HIGHEST)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def free_ports(count: int) -> list[int]:
    """As many different ones."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
