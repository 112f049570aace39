"""What runs in the process that holds Mooncake's client: it does what it is asked through sockets.

The library holds the interpreter's lock while it connects, has no deadline for some of its calls,
and may end the process; so the process is not the engine's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lmcache.core.slab import Slab

LANES = 8
"""Calls at a time: as many as tiers read and write at once by default."""
KEY_BYTES = 32
AT_ONCE = 1024
"""Keys in one request."""
REQUEST = struct.Struct("<BQ")
"""A `Call` and how much of its lane's memory it may use. The keys follow."""
ANSWER = struct.Struct("<q")
"""A length, a count or zero; less than that is an error code of Mooncake's."""
CHECKSUM = struct.Struct("<Q")
"""Behind each object in the pool: xxh3 of the object."""
_CLOSING_S = 3
_LONGEST = REQUEST.size + AT_ONCE * KEY_BYTES


class Call(IntEnum):
    """What can be asked for."""

    PUT = 1
    GET = 2
    COUNT = 3
    REMOVE = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the process is told when it starts."""

    master: str
    address: str
    """This machine's, as the others reach it."""
    metadata: str
    protocol: str
    device: str
    segment: int
    prefix: str
    memory: int
    """A file, by its descriptor: as much for each lane."""
    memory_size: int
    lanes: list[int]
    """Sockets, each for one call at a time."""


def main() -> None:
    """Serve until the other end of a socket is closed, by whatever; its number is the argument.

    It brings the settings, and is told what came of connecting.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = Settings(**json.loads(control.recv(_LONGEST)))
    memory = Slab(settings.memory, settings.memory_size)
    store, outcome = _connect(settings, memory)
    if outcome == 0:
        # what it has to say from now on, its answers say as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        for number, lane in enumerate(settings.lanes):
            place = memory.address + number * (memory.size // len(settings.lanes))
            work = (store, socket.socket(fileno=lane), place, settings.prefix)
            threading.Thread(target=_serve, args=work, daemon=True).start()
    control.send(ANSWER.pack(outcome))
    control.recv(1)
    if settings.segment:
        signal.alarm(_CLOSING_S)  # ends this process, should the master not answer
        store.close()
    os._exit(0)  # its threads are of no use any more


def _connect(settings: Settings, memory: Slab) -> tuple[Any, int]:
    os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    outcome = store.setup(
        settings.address,
        settings.metadata,
        settings.segment,
        0,  # no buffer of its own: all goes through ours
        settings.protocol,
        settings.device,
        settings.master,
    )
    return store, outcome or store.register_buffer(memory.address, memory.size)


def _serve(store: Any, lane: socket.socket, place: int, prefix: str) -> None:
    """Answer one request after the other; closes the lane whatever happens."""
    with lane:
        while request := lane.recv(_LONGEST):
            call, size = REQUEST.unpack_from(request)
            keys = range(REQUEST.size, len(request), KEY_BYTES)
            names = [prefix + request[at : at + KEY_BYTES].hex() for at in keys]
            lane.send(ANSWER.pack(_answer(store, call, names, place, size)))


def _answer(store: Any, call: int, names: list[str], place: int, size: int) -> int:
    answer: int
    if call == Call.PUT:
        answer = store.put_from(names[0], place, size)
    elif call == Call.GET:
        answer = store.get_into(names[0], place, size)
    elif call == Call.REMOVE:
        # forced, since whoever has just looked for it, us included, holds a lease on it
        answer = store.remove(names[0], force=True)
    else:
        answer = _leading(store.batch_is_exist(names))
    return answer


def _leading(exist: list[int]) -> int:
    for count, there in enumerate(exist):
        if there != 1:
            return there or count
    return len(exist)
