"""Which processors lie next to a device: memory that they touch first lies next to it as well."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")


def stay_near(bus_id: str, devices: Path = DEVICES) -> None:
    """Keep the calling thread on the processors next to a device, where the system says which."""
    with suppress(OSError, ValueError, AttributeError):
        text = (devices / bus_id.lower() / "local_cpulist").read_text()
        near = _numbers(text) & os.sched_getaffinity(os.getpid())
        if near:
            os.sched_setaffinity(0, near)


def _numbers(text: str) -> set[int]:
    """Those in a list like `0-3,8,10-11`."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
