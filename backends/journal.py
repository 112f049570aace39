"""What became of the objects in a directory: a file that all processes append to, and follow.

<dir>/journal               a symbolic link to the one that counts
<dir>/journal.<16 digits>   the time at which it was made, in nanoseconds, so none has another's

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
import re
import struct
import time
import zlib
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
ANEW, STORED, REMOVED, GONE = range(4)
_BODY = struct.Struct("<32sQQQI")
_RECORD = struct.Struct("<60sI")
_PIECE = 1 << 20
_OURS = re.compile(r"journal\.[0-9a-f]{16}(\.new)?")
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
    """The journal that the link at `path` names. One thread at a time.

    Records are appended whole, in some order, however many processes do so at once. They are not
    flushed to the device: what a power failure takes of them are objects that are lost.

    Sizes and names are looked up without `stat`: where it shows when a file was changed, the next
    write to that file notes this to the nanosecond, which costs more than the write.
    """

    def __init__(self, path: str) -> None:
        """With the directory locked, as it is made if there is none."""
        self._path = path
        self._directory = os.path.dirname(path)
        self._fd = -1
        try:
            self._reopen()
        except BackendError:
            name, fd = self._create()
            os.close(fd)
            self._appoint(name)
            self._reopen()
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
        while self._named() != self._name:  # too late for who put another in its place
            self._reopen()
            _write(self._fd, raw)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Put a file that says `records` in place of this one, all of which has been followed.

        With the directory locked. What others append meanwhile follows, unless we are killed
        in the moment between: then those objects are lost.
        """
        name, fd = self._create()
        try:
            _write(fd, b"".join(map(_packed, records)))
            self._pass_on(fd)
            self._appoint(name)
            self._pass_on(fd)
        finally:
            os.close(fd)
            self.tidy()

    def tidy(self) -> None:
        """Cut off half a record, and remove files that do not count. With the directory locked."""
        size = _size(self._fd)
        if size % _RECORD.size:
            os.ftruncate(self._fd, size // _RECORD.size * _RECORD.size)
        for name in filter(_OURS.fullmatch, os.listdir(self._directory)):
            if name != self._named():
                os.unlink(f"{self._directory}/{name}")

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _create(self) -> tuple[str, int]:
        name = f"journal.{time.time_ns():016x}"
        flags = _FLAGS | os.O_CREAT | os.O_EXCL
        return name, os.open(f"{self._directory}/{name}", flags, 0o600)

    def _appoint(self, name: str) -> None:
        link = f"{self._directory}/{name}.new"
        os.symlink(name, link)
        os.replace(link, self._path)

    def _named(self) -> str | None:
        """The one that counts; None if there is none."""
        try:
            return os.readlink(self._path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is no link
                raise
            return None

    def _reopen(self) -> None:
        name = self._named()
        try:
            if name is None or not _OURS.fullmatch(name):
                raise FileNotFoundError
            fd = os.open(f"{self._directory}/{name}", _FLAGS)
        except FileNotFoundError:
            raise BackendError(f"{self._path!r} was removed; open the backend again") from None
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._name, self._followed, self._is_another = fd, name, 0, True

    def _look(self) -> int:
        """The size of the file that counts now."""
        if self._named() == self._name and (size := _size(self._fd)) >= self._followed:
            return size
        self._is_another = True
        try:
            self._reopen()
        except BackendError:  # the directory is gone, or will be in a moment
            return 0
        return _size(self._fd)

    def _unread(self, size: int) -> bytes:
        """Some whole records that have not been followed, of a file of `size` bytes."""
        more = min(size - self._followed, _PIECE) // _RECORD.size * _RECORD.size
        if more <= 0:
            return b""
        raw = os.pread(self._fd, more, self._followed)
        self._followed += len(raw) // _RECORD.size * _RECORD.size
        return raw[: len(raw) // _RECORD.size * _RECORD.size]

    def _pass_on(self, fd: int) -> None:
        while raw := self._unread(_size(self._fd)):
            _write(fd, raw)


def _packed(record: Record) -> bytes:
    body = _BODY.pack(*record)
    return _RECORD.pack(body, zlib.crc32(body))


def _write(fd: int, raw: bytes) -> None:
    if os.write(fd, raw) < len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _size(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_END)
