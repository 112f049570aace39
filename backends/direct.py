"""Bytes between memory and files, past the page cache or through it."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 4096
"""What `O_DIRECT` wants addresses, offsets and lengths to be multiples of, on any common disk."""
_SPARE_BYTES = 1 << 20
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP)


class Transfer:
    """Writes and reads objects that begin a block of a file; any number of threads at once.

    If `direct`, all that lies at addresses of blocks goes straight between memory and disk, and the
    rest of an object (its last, broken block, or everything if the memory does not begin a block)
    through spare memory; its last block ends in zeros. A view is never read or written beyond its
    end.
    """

    def __init__(self, *, direct: bool) -> None:
        self.direct = direct
        self.flags = _DIRECT if direct else 0
        """For `os.open`."""
        self._spares: deque[memoryview] = deque()
        if direct:
            _address(memoryview(b" "))  # loads numpy now, rather than while an object waits

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        """Put `data` into a file."""
        size, straight = data.nbytes, self._straight_bytes(data)
        done = os.pwrite(fd, data[:straight], offset) if straight else 0
        if done == size:
            return
        with self._spare() as spare:
            while done < size:
                rest = data[max(done, straight) :][:_SPARE_BYTES]
                room = spare[: padded(rest.nbytes) if rest else 0]
                room[: rest.nbytes] = rest
                room[rest.nbytes :] = bytes(room.nbytes - rest.nbytes)
                done += os.pwritev(fd, [data[done:straight], room], offset + done)

    def read(self, fd: int, out: memoryview, offset: int) -> bool:
        """Fill `out` from a file; False if that ends before."""
        size, straight = out.nbytes, self._straight_bytes(out)
        done = os.preadv(fd, [out[:straight]], offset) if straight else 0
        if done == size:
            return True
        with self._spare() as spare:
            while done < size:
                rest = out[max(done, straight) :][:_SPARE_BYTES]
                room = spare[: padded(rest.nbytes) if rest else 0]
                goal = done + len(out[done:straight]) + rest.nbytes
                count = os.preadv(fd, [out[done:straight], room], offset + done)
                came = max(0, min(done + count, goal) - max(done, straight))
                rest[:came] = room[:came]
                done += count
                if done < goal and (not count or (self.direct and done % BLOCK)):
                    return False
        return True

    def _straight_bytes(self, view: memoryview) -> int:
        """How many bytes of `view`, from the front, need no spare memory."""
        if not self.direct:
            return view.nbytes
        return 0 if _address(view) % BLOCK else view.nbytes // BLOCK * BLOCK

    @contextmanager
    def _spare(self) -> Iterator[memoryview]:
        """Memory that begins at an address of a block, and is nobody else's meanwhile."""
        try:
            spare = self._spares.pop()
        except IndexError:
            spare = memoryview(mmap.mmap(-1, _SPARE_BYTES))
        try:
            yield spare
        finally:
            self._spares.append(spare)


def transfer_beside(path: str, *, direct: bool | None) -> Transfer:
    """For files in the directory of `path`; direct if that is asked for, or nothing and possible.

    It is tried by reading `path`, as that needs no room on a full disk.
    """
    is_possible = direct is not False and _can_read_directly(path)
    if direct and not is_possible:
        raise ConfigError(
            f"the file system of {path!r} has no way past the page cache; leave out direct=true"
        )
    return Transfer(direct=is_possible)


def _can_read_directly(path: str) -> bool:
    if not _DIRECT:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, BLOCK)], 0)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def padded(size: int) -> int:
    """What an object of `size` bytes takes up: whole blocks, and one at least."""
    return max(1, -(-size // BLOCK)) * BLOCK


def _address(view: memoryview) -> int:
    import numpy as np

    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
