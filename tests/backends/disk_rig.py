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
from lmcache.backends.shared_lock import SharedLock

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


def segments(root: Path) -> list[Path]:
    """The files that hold objects, in the order in which they were made."""
    return sorted(root.glob("*.segment"))


def size_of(path: Path) -> int:
    """0 of one that has just been removed."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def charged(root: Path) -> int:
    """What our files in `root` weigh."""
    return sum(map(size_of, segments(root)))


def charged_now(root: Path) -> int:
    """The same, while nobody makes a file or takes one away."""
    lock = SharedLock(f"{root}/lock")
    with lock:
        weight = charged(root)
    lock.close()
    return weight


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


def python(code: str, *args: object, stdin: int | None = None) -> subprocess.Popen[str]:
    """A real process that runs `code` in the names of this file."""
    prelude = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("disk_rig", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update(vars(module))
"""
    command = [sys.executable, "-c", prelude + code, *map(str, args)]
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True)


def eventually(condition, timeout_s: float = 10) -> None:
    """Return once `condition()` is true, as what is done in the background makes it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def grow_old(root: Path, seconds: float = 60) -> None:
    """Have all objects been used that much earlier, in the same order."""
    for path in segments(root):
        found = path.stat()
        os.utime(path, ns=(found.st_mtime_ns - int(seconds * 1e9),) * 2)
