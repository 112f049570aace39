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

from lmcache.core.errors import BackendClosed, BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

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
    """The journal that the link at `path` names. One thread at a time, unless said otherwise.

    Records are appended whole, in some order, however many processes do so at once. They are not
    flushed to the device: what a power failure takes of them are objects that are lost.

    Sizes and names are looked up without `stat`: where it shows when a file was changed, the next
    write to that file notes this to the nanosecond, which costs more than the write.
    """

    def __init__(self, path: str) -> None:
        """With the directory locked, as it is made if there is none."""
        self._path = path
        self._directory = os.path.dirname(path)
        self._closed = False
        try:
            file = self._open()
        except BackendError:
            self._appoint(self._create())
            file = self._open()
        file.is_heard = True  # there is nothing before that it could void
        self._file: _File | None = file
        """What is followed."""
        self._end: _File | None = file
        """What is appended to, by other threads meanwhile; it may be one that counts no more."""

    @property
    def records(self) -> int:
        """How many there are, as far as they have been followed."""
        return self._opened(self._file).followed // _RECORD.size

    def news(self) -> Iterator[tuple[bytes, int, int, int, int]]:
        """Records that were appended since; first a `VOID` if nothing that came before holds."""
        unpack, crc32 = _BODY.unpack, zlib.crc32
        file, size = self._look()
        if not (file and file.is_heard):
            yield VOID
        if not file:
            return
        file.is_heard = True
        while raw := file.unread(size):
            for body, checksum in _RECORD.iter_unpack(raw):
                if crc32(body) == checksum:
                    yield unpack(body)

    def append(self, record: Record) -> None:
        """Add what happened, for all to see at once; it is news for us as for all others.

        Any number of threads at once, whatever others do.
        """
        file, raw = self._opened(self._end), _packed(record)
        _write(file.fd, raw)
        while self._named() != file.name:  # too late for who put another in its place
            self._end = file = self._open()
            self._let_go_if_closed()
            _write(file.fd, raw)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Put a file that says `records` in place of this one, all of which has been followed.

        With the directory locked. What others append meanwhile follows, unless we are killed, or
        the last room is taken, in the moment between: then those objects are lost.
        """
        before, new = self._opened(self._file), self._create()
        followed = before.followed
        try:
            _write(new.fd, b"".join(map(_packed, records)))
            before.pass_on(new.fd)
            self._appoint(new)
            before.pass_on(new.fd)
        finally:
            before.followed = followed  # what was passed on is still news, should this one stay
            self.tidy()

    def tidy(self) -> None:
        """Cut off half a record, and remove files that do not count. With the directory locked."""
        file = self._opened(self._file)
        size = _size(file.fd)
        if size % _RECORD.size:
            os.ftruncate(file.fd, size // _RECORD.size * _RECORD.size)
        for name in filter(_OURS.fullmatch, os.listdir(self._directory)):
            if name != self._named():
                os.unlink(f"{self._directory}/{name}")

    def close(self) -> None:
        """Let go of the file; all else raises `BackendClosed` then. Any thread, at any time."""
        self._closed = True
        self._let_go_if_closed()

    def _let_go_if_closed(self) -> None:
        if self._closed:
            self._file = self._end = None

    def _opened(self, file: _File | None) -> _File:
        if self._closed or file is None:
            raise BackendClosed(f"{self._path!r} is closed")
        return file

    def _create(self) -> _File:
        name = f"journal.{time.time_ns():016x}"
        flags = _FLAGS | os.O_CREAT | os.O_EXCL
        return _File(name, os.open(f"{self._directory}/{name}", flags, 0o600))

    def _appoint(self, file: _File) -> None:
        link = f"{self._directory}/{file.name}.new"
        os.symlink(file.name, link)
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

    def _open(self) -> _File:
        name = self._named()
        try:
            if name is None or not _OURS.fullmatch(name):
                raise FileNotFoundError
            return _File(name, os.open(f"{self._directory}/{name}", _FLAGS))
        except FileNotFoundError:
            raise BackendError(f"{self._path!r} was removed; open the backend again") from None

    def _look(self) -> tuple[_File | None, int]:
        """The file that counts now, and its size."""
        file = self._opened(self._file)
        if self._named() == file.name and (size := _size(file.fd)) >= file.followed:
            return file, size
        try:
            self._file = self._end = opened = self._open()
        except BackendError:  # the directory is gone, or will be in a moment
            file.followed, file.is_heard = 0, False  # it may come back
            return None, 0
        self._let_go_if_closed()
        return opened, _size(opened.fd)


class _File:
    """A journal that is open until nobody has this object any more."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd
        self.followed = 0
        self.is_heard = False
        """Whether it was said that it is another."""

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)

    def unread(self, size: int) -> bytes:
        """Some whole records that have not been followed, of `size` bytes in all."""
        more = min(size - self.followed, _PIECE) // _RECORD.size * _RECORD.size
        if more <= 0:
            return b""
        raw = os.pread(self.fd, more, self.followed)
        self.followed += len(raw) // _RECORD.size * _RECORD.size
        return raw[: len(raw) // _RECORD.size * _RECORD.size]

    def pass_on(self, fd: int) -> None:
        """Append to `fd` what has not been followed."""
        while raw := self.unread(_size(self.fd)):
            _write(fd, raw)


def _packed(record: Record) -> bytes:
    body = _BODY.pack(*record)
    return _RECORD.pack(body, zlib.crc32(body))


def _write(fd: int, raw: bytes) -> None:
    if os.write(fd, raw) < len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _size(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_END)
