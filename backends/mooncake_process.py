"""The process that holds Mooncake's client, as seen from ours."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from dataclasses import asdict
from queue import Empty, LifoQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_64_intdigest

from lmcache.backends.mooncake_child import ANSWER, CHECKSUM, LANES, REQUEST, Settings
from lmcache.core.slab import Slab, anonymous_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lmcache.backends.mooncake_child import Call

_STARTING_S = 120.0
"""To make a large contribution to a pool takes a while."""
_ENDING_S = 5.0
_LONGEST_COMPLAINT = 400


class Lane:
    """Asks one thing at a time, and has memory of its own for the bytes."""

    def __init__(self, sock: socket.socket, memory: memoryview, timeout_s: float) -> None:
        self._socket = sock
        self._timeout_s = timeout_s
        # not by whoever ends the process: somebody may still listen
        weakref.finalize(self, sock.close)
        self._memory: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.is_late = False
        """What it was asked has not been answered: until then its memory is not ours."""

    def ask(self, call: Call, keys: bytes, size: int = 0) -> int:
        """The answer. Raises `TimeoutError` if it is late."""
        self._socket.settimeout(self._timeout_s)
        self.is_late = True
        self._socket.send(REQUEST.pack(call, size) + keys)
        return self._answer()

    def look(self) -> None:
        """See whether a late answer has come."""
        self._socket.settimeout(0)
        with suppress(BlockingIOError):
            self._answer()

    def _answer(self) -> int:
        data = self._socket.recv(ANSWER.size)
        if not data:
            raise ConnectionResetError("its client has ended")
        self.is_late = False
        answer: int = ANSWER.unpack(data)[0]
        return answer

    def fill(self, data: memoryview) -> None:
        """Copy `data` to where the next call finds it, and its checksum behind it."""
        self._memory[: data.nbytes] = np.frombuffer(data, np.uint8)
        CHECKSUM.pack_into(self._memory.data, data.nbytes, xxh3_64_intdigest(data))

    def empty_into(self, out: memoryview, size: int) -> bool:
        """Copy the object that the last call has brought to the front of `out`.

        It is of `size` bytes with its checksum; returns whether that is right.
        """
        length = size - CHECKSUM.size
        if length < 0:
            return False
        np.frombuffer(out, np.uint8)[:length] = self._memory[:length]
        (checksum,) = CHECKSUM.unpack_from(self._memory.data, length)
        return bool(xxh3_64_intdigest(out[:length]) == checksum)


class MooncakeProcess:
    """One life of the process. Whatever is wrong with it raises an `OSError`."""

    def __init__(self, memory_size: int, timeout_s: float, **settings: Any) -> None:
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._ready = False
        self._memory = Slab.create(memory_size)
        self._said = os.fdopen(anonymous_file(0), "rb")
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(LANES + 1)]
        theirs = [their.fileno() for _, their in pairs]
        told = Settings(
            **settings,
            memory=self._memory.fd,
            memory_size=memory_size,
            lanes=theirs[1:],
        )
        self._control = pairs[0][0]
        self._control.send(json.dumps(asdict(told)).encode())
        self._process = run_python(
            "from lmcache.backends.mooncake_child import main; main()",
            str(theirs[0]),
            stderr=self._said,
            pass_fds=(self._memory.fd, *theirs),
        )
        for _, their in pairs:
            their.close()
        size = memory_size // LANES
        self._free: LifoQueue[Lane] = LifoQueue()
        for number, (ours, _) in enumerate(pairs[1:]):
            place = self._memory.view[number * size : (number + 1) * size]
            self._free.put(Lane(ours, place, timeout_s))
        self._late: set[Lane] = set()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when it is connected. Raises `TimeoutError` if it is still at it."""
        if self._ready:
            return
        self._control.settimeout(self._timeout_s)
        try:
            data = self._control.recv(ANSWER.size)
        except TimeoutError:
            if time.monotonic() - self._began < _STARTING_S:
                raise
            raise ConnectionError(f"its client has not connected for {_STARTING_S:.0f} s") from None
        if not data or ANSWER.unpack(data)[0] != 0:
            raise ConnectionError(f"its client could not connect: {self._complaints()}")
        self._ready = True

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """A lane for one call. One whose answer is late is left alone until that has come."""
        lane = self._take()
        try:
            yield lane
        finally:
            if lane.is_late:
                with self._lock:
                    self._late.add(lane)
            else:
                self._free.put(lane)

    def _take(self) -> Lane:
        with self._lock:
            for lane in [*self._late]:
                lane.look()
                if not lane.is_late:
                    self._late.remove(lane)
                    self._free.put(lane)
            if len(self._late) == LANES:
                raise ConnectionError("its client does not answer")
        try:
            return self._free.get(timeout=self._timeout_s)
        except Empty:
            raise TimeoutError("as much as can be is under way") from None

    def _complaints(self) -> str:
        """What the process has written of errors, in the format of Google's logs, or else last."""
        text = os.pread(self._said.fileno(), 1 << 20, 0).decode(errors="replace")
        errors = re.findall(r"^[EF][0-9. :]+[\w.]+:[0-9]+\] (.*)$", text, re.MULTILINE)
        return "; ".join(errors)[:_LONGEST_COMPLAINT] or text.strip().rpartition("\n")[2]

    def close(self, *, at_once: bool = False) -> None:
        """End the process, which takes leave of the pool unless `at_once`. Any thread, any time."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if at_once or not self._ready else _ENDING_S)
        self._process.kill()
        self._process.wait()
        self._memory.close()
        self._said.close()


def run_python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python that finds the modules that this one finds, and no signal of a terminal."""
    code = f"import sys; sys.path[:] = {sys.path!r}; {code}"
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )


def why_it_cannot_be_imported() -> str:
    """What Python says of the library, empty if nothing. Nothing of it is left in this process."""
    with run_python("import mooncake.store", stderr=subprocess.PIPE) as process:
        _, said = process.communicate()
    return said.decode(errors="replace").strip().rpartition("\n")[2] if process.returncode else ""
