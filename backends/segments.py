"""The files of a directory that hold objects, one after another.

<dir>/lock                  held by whoever makes segments, takes them away or removes objects
<dir>/journal               where each object lies; see `journal`
<dir>/<16 digits>.segment   objects, each of which begins a block; locked by whoever fills it

The digits are a number: the time, in nanoseconds, at which the segment was made or made anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from lmcache.backends.shared_lock import try_flock

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = re.compile(r"([0-9a-f]{16})\.segment")
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP)
_TOUCH_NS = 5 * 10**9
_LITTLE = 16
"""What is left behind its end may be one part of so many of a segment."""


class Found(NamedTuple):
    """A segment as it lies there."""

    number: int
    size: int
    used_ns: int


class Segment:
    """A segment that nobody but this object may write to or take away, until it is closed."""

    def __init__(self, directory: str, number: int, fd: int) -> None:
        self.number = number
        self.fd = fd
        self.end = 0
        """Where the next object begins."""
        self.writers = 0
        self._directory = directory
        self.size = os.fstat(fd).st_size

    @property
    def is_intact(self) -> bool:
        """Whether nobody has taken it away, or the end of it."""
        # not `fstat`: who is shown its times has the next write note them to the nanosecond
        is_whole = os.lseek(self.fd, 0, os.SEEK_END) == self.size
        return is_whole and os.access(path_of(self._directory, self.number), os.F_OK)

    def renew(self) -> bool:
        """Give it another number; False if it is gone. With the directory locked."""
        number = _new_number(self._directory)
        try:
            os.rename(path_of(self._directory, self.number), path_of(self._directory, number))
        except FileNotFoundError:
            return False
        self.number = number
        return True

    def resize(self, size: int) -> None:
        """Let go of what lies behind `size`, or have blocks up to there."""
        if size < self.size:
            os.ftruncate(self.fd, size)
        elif size > self.size:
            _allocate(self.fd, size)
        self.size = size

    def finish(self, end: int) -> None:
        """Leave it to others, without what lies behind `end` if that is much of it.

        It counts as used as before. Little is left there, as new blocks would be slower.
        """
        try:
            found = os.fstat(self.fd)
            if not end:
                self._unlink()
            elif found.st_size - end > found.st_size // _LITTLE:
                os.ftruncate(self.fd, end)
                os.utime(self.fd, ns=(found.st_atime_ns, found.st_mtime_ns))
        finally:
            self.close()

    def unlink(self) -> None:
        """Take it away and close it. Who reads it may go on."""
        try:
            self._unlink()
        finally:
            self.close()

    def _unlink(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path_of(self._directory, self.number))

    def close(self) -> None:
        """Leave it to others; again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child may have it open, too
            os.close(fd)


class Segments:
    """The segments in `directory`. `flags` are for opening them."""

    def __init__(self, directory: str, flags: int) -> None:
        self.directory = directory
        self._flags = flags | os.O_CLOEXEC | os.O_NOFOLLOW

    def __iter__(self) -> Iterator[Found]:
        """All that do not vanish before we look at them; nothing else in the directory."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                named = _NAME.fullmatch(entry.name)
                if named and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield Found(int(named[1], 16), found.st_size, found.st_mtime_ns)

    def read(self, number: int) -> int:
        """Open a segment for reading."""
        return os.open(path_of(self.directory, number), os.O_RDONLY | self._flags)

    def take(self, number: int) -> Segment | None:
        """Have a segment for ourselves; None if somebody has it, or it is gone."""
        with suppress(FileNotFoundError):
            return self._locked(number, os.O_RDWR)
        return None

    def create(self) -> Segment:
        """A new, empty one. With the directory locked. Raises what `os.open` does."""
        number = _new_number(self.directory)
        segment = self._locked(number, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        assert segment, "whoever takes a segment has the directory locked"
        return segment

    def _locked(self, number: int, flags: int) -> Segment | None:
        fd = os.open(path_of(self.directory, number), flags | self._flags, 0o600)
        try:
            if try_flock(fd) and os.fstat(fd).st_nlink:
                return Segment(self.directory, number, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None


def path_of(directory: str, number: int) -> str:
    """Where a segment lies."""
    return f"{directory}/{number:016x}.segment"


def touch(fd: int) -> None:
    """Note that a segment is used now, unless the last note is fresh, or none can be made."""
    now = time.time_ns()
    if abs(now - os.fstat(fd).st_mtime_ns) > _TOUCH_NS:
        with suppress(OSError):
            os.utime(fd, ns=(now, now))


def _new_number(directory: str) -> int:
    number = time.time_ns()
    while os.path.exists(path_of(directory, number)):
        number += 1
    return number


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)
