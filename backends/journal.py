"""What became of the objects in a directory: a file that all processes append to, and follow.

It is a sequence of records of 64 bytes, in little-endian order:

    key         32 bytes    of an object; zeros if the record is of a whole segment
    segment     u64         the file in which the object lies
    offset      u64         where it begins there
    length      u64         its bytes
    kind        u32         1 stored, 2 removed, 3 the segment and all in it are gone
    checksum    u32         CRC-32 of the 60 bytes before

A record with another checksum means nothing, and neither does what is too short for one.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from lmcache.backends.shared_lock import inode
from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
ANEW, STORED, REMOVED, GONE = range(4)
_BODY = struct.Struct("<32sQQQI")
_RECORD = struct.Struct("<60sI")
_PIECE = 1 << 20
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Record(NamedTuple):
    """One thing that happened."""

    key: bytes
    segment: int
    offset: int
    length: int
    kind: int


VOID = Record(bytes(32), 0, 0, 0, ANEW)
"""Never written: nothing that was said so far holds."""


class Journal:
    """The journal at `path`. One thread at a time.

    Records are appended whole, in some order, however many processes do so at once. They are not
    flushed to the device: what a power failure takes of them are objects that are lost.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, _FLAGS | os.O_CREAT, 0o600)
        self._inode = inode(self._fd)
        self._followed = 0
        self._is_another = False

    @property
    def records(self) -> int:
        """How many there are, as far as they have been followed."""
        return self._followed // _RECORD.size

    def news(self) -> Iterator[tuple[bytes, int, int, int, int]]:
        """Records that were appended since; first a `VOID` if nothing that came before holds."""
        unpack, crc32 = _BODY.unpack, zlib.crc32
        size = self._look()
        if self._is_another:
            self._is_another = False
            yield VOID
        while raw := self._unread(size):
            for body, checksum in _RECORD.iter_unpack(raw):
                if crc32(body) == checksum:
                    yield unpack(body)

    def append(self, record: Record) -> None:
        """Add what happened, for all to see at once; it is news for us as for all others."""
        raw = _packed(record)
        _write(self._fd, raw)
        while inode(self._path) != self._inode:  # too late for who put another in its place
            self._reopen()
            _write(self._fd, raw)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Put a file that says `records` in place of this one, all of which has been followed.

        With the directory locked. What others append meanwhile follows, unless we are killed
        in the moment between: then those objects are lost.
        """
        path = f"{self._path}.new"
        fd = os.open(path, _FLAGS | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write(fd, b"".join(map(_packed, records)))
            self._pass_on(fd)
            os.replace(path, self._path)
            self._pass_on(fd)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _pass_on(self, fd: int) -> None:
        while raw := self._unread(os.fstat(self._fd).st_size):
            _write(fd, raw)

    def mend(self) -> None:
        """Cut off the half of a record that a power failure or a full disk may have left."""
        size = os.fstat(self._fd).st_size
        if size % _RECORD.size:
            os.ftruncate(self._fd, size // _RECORD.size * _RECORD.size)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _look(self) -> int:
        """The size of the file that lies there now."""
        with suppress(FileNotFoundError):
            found = os.stat(self._path)
            is_ours = (found.st_dev, found.st_ino) == self._inode
            if is_ours and found.st_size >= self._followed:
                return found.st_size
        self._is_another = True
        try:
            self._reopen()
        except BackendError:  # the directory is gone, or will be in a moment
            return 0
        return os.fstat(self._fd).st_size

    def _unread(self, size: int) -> bytes:
        """Some whole records that have not been followed, of a file of `size` bytes."""
        more = min(size - self._followed, _PIECE) // _RECORD.size * _RECORD.size
        if more <= 0:
            return b""
        raw = os.pread(self._fd, more, self._followed)
        self._followed += len(raw) // _RECORD.size * _RECORD.size
        return raw[: len(raw) // _RECORD.size * _RECORD.size]

    def _reopen(self) -> None:
        try:
            fd = os.open(self._path, _FLAGS)
        except FileNotFoundError:
            raise BackendError(f"{self._path!r} was removed; open the backend again") from None
        os.close(self._fd)
        self._fd, self._inode, self._followed, self._is_another = fd, inode(fd), 0, True


def _packed(record: Record) -> bytes:
    body = _BODY.pack(*record)
    return _RECORD.pack(body, zlib.crc32(body))


def _write(fd: int, raw: bytes) -> None:
    if os.write(fd, raw) < len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
