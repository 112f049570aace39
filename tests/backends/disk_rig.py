"""What the tests of the disk backend share: objects that tell who they are, and real disks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lmcache.backends.disk import DiskBackend
from lmcache.backends.ledger import Ledger

MB = 1_000_000


def key(n: int) -> bytes:
    return hashlib.sha256(b"%d" % n).digest()


def pattern(n: int, size: int) -> memoryview:
    """Bytes that tell which object they belong to, wherever they are cut."""
    return memoryview((key(n) * (size // 32 + 1))[:size])


def put(backend: DiskBackend, n: int, size: int) -> bool:
    return backend.put(key(n), pattern(n, size))


def got(backend: DiskBackend, n: int, room: int = 4 * MB) -> bytes | None:
    out = memoryview(bytearray(room))
    size = backend.get_into(key(n), out)
    return None if size is None else bytes(out[:size])


def present(backend: DiskBackend, numbers: range) -> list[int]:
    return [n for n in numbers if backend.contains(key(n))]


def files(root: Path, suffix: str) -> list[Path]:
    return [path for path in root.rglob(f"*{suffix}") if path.is_file()]


def torn(root: Path) -> list[Path]:
    """Files that were not finished; what has no bytes yet may be about to be locked."""
    return [path for path in files(root, ".tmp") if size_of(path)]


def size_of(path: Path) -> int:
    """0 of one that has just been removed."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def charged(root: Path) -> int:
    """What our files in `root` weigh, in blocks."""
    ours = [path for suffix in (".kv", ".damaged", ".tmp") for path in files(root, suffix)]
    return sum(-(-size_of(path) // 4096) * 4096 for path in ours)


def ledger_and_truth(root: Path) -> tuple[int, int]:
    ledger = Ledger(f"{root}/usage")
    with ledger:
        result = ledger.used, charged(root)
    ledger.close()
    return result


@contextmanager
def mounted(where: Path, options: str):
    """A small file system of its own, whose use of space is one number at every instant."""
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def used_bytes(root: Path) -> int:
    disk = os.statvfs(root)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def free_bytes(root: Path) -> int:
    disk = os.statvfs(root)
    return disk.f_bavail * disk.f_frsize


def python(code: str, *args: object) -> subprocess.Popen[str]:
    """A real process that runs `code` in the names of this file."""
    prelude = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("disk_rig", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update(vars(module))
"""
    command = [sys.executable, "-c", prelude + code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def eventually(condition, timeout_s: float = 10) -> None:
    """Return once `condition()` is true, as what is done in the background makes it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def is_settled(root: Path) -> bool:
    used, truth = ledger_and_truth(root)
    return used == truth


def grow_old(root: Path, seconds: float = 60) -> None:
    """Have all objects been used that much earlier, in the same order."""
    for path in files(root, ".kv"):
        found = path.stat()
        os.utime(path, ns=(found.st_mtime_ns - int(seconds * 1e9),) * 2)
