"""Which processors lie next to whom: memory that they touch first lies there as well."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
NODES = Path("/sys/devices/system/node")


def stay_near(bus_id: str, devices: Path = DEVICES) -> None:
    """Keep the calling thread on the processors next to a device, where the system says which."""
    with suppress(OSError, ValueError, AttributeError):
        text = (devices / bus_id.lower() / "local_cpulist").read_text()
        near = _numbers(text) & os.sched_getaffinity(os.getpid())
        if near:
            os.sched_setaffinity(0, near)


def stay_on_node(nodes: Path = NODES) -> None:
    """Let the calling thread use all processors of the nodes that the main thread may run on.

    Engines keep that thread on one processor, and each worker's on a node of its own.
    """
    with suppress(OSError, ValueError, AttributeError):
        main = os.sched_getaffinity(os.getpid())
        lists = [_numbers(file.read_text()) for file in nodes.glob("node*/cpulist")]
        near = set().union(*(numbers for numbers in lists if numbers & main))
        os.sched_setaffinity(0, near or range(os.cpu_count() or 1))


def _numbers(text: str) -> set[int]:
    """Those in a list like `0-3,8,10-11`, which may be empty."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
