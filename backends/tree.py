"""Where the files of objects lie in a directory, and what they weigh.

<dir>/ab/c/abc...64 hex digits.kv    an object: nothing but its bytes
<dir>/ab/c/abc...digits.damaged  one that was damaged, for people to look at
<dir>/ab/c/abc...digits.*.tmp        one being written; its writer holds an flock on it
<dir>/usage                          what all processes have charged; see `ledger`

All files whose names begin with the same three digits lie in one leaf.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

KEPT, DAMAGED = "kv", "damaged"
_BLOCK = 4096
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP)
_TOUCH_NS = 5 * 10**9
_DIGITS = 64
_FIRST, _SECOND = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]")
_FILE = re.compile(r"[0-9a-f]{64}\.(kv|damaged|[0-9a-f]{16}\.tmp)")


def leaf_of(name: str) -> int:
    """The number of the leaf in which the object called `name`, 64 hex digits, is or would be."""
    assert len(name) == _DIGITS
    return int(name[:3], 16)


def path_of(directory: str, name: str, kind: str = KEPT) -> str:
    """Where the object called `name` is or would be."""
    assert len(name) == _DIGITS
    return f"{directory}/{name[:2]}/{name[2]}/{name}.{kind}"


def charge_of(size: int) -> int:
    """What a file of `size` bytes weighs: whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


def claim(path: str, flags: int) -> int:
    """Open a new, empty file for writing, and lock it for as long as it is open."""
    fd = _create(path, flags)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException:
        os.close(fd)
        os.unlink(path)
        raise
    return fd


def allocate(fd: int, size: int) -> None:
    """Give a file its size and, where the file system can, its blocks."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)


def touch(fd: int, last_ns: int = 0) -> None:
    """Note that an object is used now, unless the last note is fresh."""
    now = time.time_ns()
    if abs(now - last_ns) > _TOUCH_NS:
        os.utime(fd, ns=(now, now))


def leaves(directory: str) -> Iterator[int]:
    """The numbers of the leaves that exist."""
    for first in _names(directory, _FIRST):
        for second in _names(f"{directory}/{first}", _SECOND):
            yield int(first + second, 16)


def files(directory: str, leaf: int) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """Every file of ours in a leaf that does not vanish before we look at it."""
    digits = f"{leaf:03x}"
    with (
        suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(f"{directory}/{digits[:2]}/{digits[2]}") as entries,
    ):
        for entry in entries:
            ours = entry.name.startswith(digits) and _FILE.fullmatch(entry.name)
            if ours and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield entry, entry.stat(follow_symlinks=False)


def _names(directory: str, pattern: re.Pattern[str]) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return list(filter(pattern.fullmatch, os.listdir(directory)))
    return []


def _create(path: str, flags: int) -> int:
    """Open a new file, and make its directories if need be."""
    flags |= os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        parent = os.path.dirname(path)
        for directory in (os.path.dirname(parent), parent):
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)
        return os.open(path, flags, 0o600)
