"""The L1 memory: one region that several processes map."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import tempfile
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WORD = struct.Struct("<Q")
CONTROL_BYTES = 65536
"""The slab's first bytes: one cache line of words per mover, of all engines. Slots follow."""
MOVER_BYTES = 64
MAX_MOVERS = CONTROL_BYTES // MOVER_BYTES

_libc = ctypes.CDLL(None)
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)


def anonymous_file(size: int) -> int:
    """The descriptor of a file without a name, so that no crash leaves one behind."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("lmcache", os.MFD_CLOEXEC)
    else:
        handle, path = tempfile.mkstemp(prefix="lmcache-")
        os.unlink(path)
        fd = handle
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; elsewhere `populate` does nothing."""


def populate(address: int, length: int) -> None:
    """Have the kernel map the pages of a range now. Releases the interpreter lock; a hint."""
    if sys.platform == "linux":
        first = address - address % mmap.PAGESIZE  # of another one it would map nothing
        _libc.madvise(
            ctypes.c_void_p(first),
            ctypes.c_size_t(address + length - first),
            ctypes.c_int(_MADV_POPULATE_WRITE),
        )


class Slab:
    """A mapping of `size` bytes. Reserved at once whatever its size; pages come on first touch.

    What nobody has closed goes with the last reference to it.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Owns `fd` from now on, even if it cannot be mapped."""
        self.fd = fd
        """Pass it to another process to share the memory."""
        self.size = size
        self.on_close: list[Callable[[], None]] = []
        """Called, the last one first, before it is unmapped."""
        self._close_fd = weakref.finalize(self, os.close, fd)
        try:
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | _NORESERVE)
        except BaseException:
            self._close_fd()
            raise
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def create(cls, size: int) -> Slab:
        """Reserve a new slab of `size` bytes, all zero."""
        return cls(anonymous_file(size), size)

    def read_word(self, offset: int) -> int:
        """The 64-bit word at `offset`."""
        value: int = WORD.unpack_from(self.view, offset)[0]
        return value

    def write_word(self, offset: int, value: int) -> None:
        """Publish a 64-bit word; what was copied before is visible to whoever reads it.

        On any processor: copies release the interpreter lock, and taking it again is a fence.
        """
        WORD.pack_into(self.view, offset, value)

    def populate(self, offset: int, length: int) -> None:
        """Have the kernel map a range now, so that no copy waits for it later.

        Releases the interpreter lock. A hint: what the kernel will not do now, the copy will.
        """
        populate(self.address + offset, length)

    def lend(self) -> Slab:
        """The same mapping, for a user of it who closes what he is given."""
        loan = object.__new__(_Loan)
        loan.__dict__.update(self.__dict__)
        return loan

    def close(self) -> None:
        """Unmap. The memory goes when the last process that maps it has closed it.

        Parts of `view` that somebody still holds keep the mapping until they are gone.
        """
        while self.on_close:
            self.on_close.pop()()
        self.view.release()
        with suppress(BufferError):
            self._map.close()
        self._close_fd()
        self.fd = -1


class _Loan(Slab):
    """Somebody else's slab."""

    def close(self) -> None:
        """Unmap nothing: that is for the owner."""
