"""How the leader has every rank copy what it has to store of a request that ends, now.

When TensorRT-LLM asks the leader about such a request, no other rank is asked or told anything
before its blocks are taken back. So they are asked through pipes.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import threading
import time
import weakref
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING

from lmcache.core.errors import LayoutError
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

BEGIN_S = 3.0
"""How soon a rank has to begin. One that has begun is waited for."""
QUESTION = Struct("=QQd")
"""The request, the pass, and by when to begin: a time of this machine's monotonic clock."""
ANSWER = Struct("=IB")
"""The rank, and one of these:"""
BEGINS, COPIED, FAILED, CLOSED = range(4)


def _pipes_of(engine_id: str) -> Path:
    return Path(f"/dev/shm/lmcache-ask-{engine_id}")  # noqa: S108 - made anew, for us alone


def make_pipes(engine_id: str, ranks: int) -> None:
    """On the leader, before others look for them; to be removed even if this fails.

    Raises `LayoutError` where there can be none.
    """
    try:
        _pipes_of(engine_id).mkdir(0o700)
        for name in ("answers", *range(ranks)):
            os.mkfifo(_pipes_of(engine_id) / str(name), 0o600)
    except OSError as error:
        raise LayoutError(f"ranks cannot be asked: {error}") from error


def remove_pipes(engine_id: str) -> None:
    """Let nobody else open them, who has them keeps them; again does nothing."""
    shutil.rmtree(_pipes_of(engine_id), ignore_errors=True)


class _Pipe:
    """One of them, open both ways, so that neither end waits for the other to open it."""

    def __init__(self, engine_id: str, name: object) -> None:
        try:
            self._fd = os.open(_pipes_of(engine_id) / str(name), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LayoutError(f"this rank cannot be asked by the leader: {error}") from error
        weakref.finalize(self, os.close, self._fd)

    def put(self, message: bytes) -> None:
        os.write(self._fd, message)

    def take(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def has_some(self, timeout_s: float | None) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else math.ceil(timeout_s * 1000)))


class Answerer:
    """A rank's end: a thread that waits to be asked."""

    def __init__(self, engine_id: str, rank: int) -> None:
        """Raises `LayoutError` if there are no pipes, as on another machine than the leader's."""
        self._rank = rank
        self._questions = _Pipe(engine_id, rank)
        self._answers = _Pipe(engine_id, "answers")
        self._thread = threading.Thread(target=self._answer_all, name="lmcache-asked", daemon=True)
        self._copy: Callable[[int], None] | None = None
        """None when it is closing."""
        self._noted = threading.Condition()
        self.number = 0
        """The last pass of which it is known what it is to store, as of those before."""

    def start(self, copy: Callable[[int], None]) -> None:
        """Have `copy` called with each request asked about, in time."""
        self._copy = copy
        self._thread.start()

    def note(self, number: int) -> None:
        """It is known now what a pass is to store."""
        with self._noted:
            self.number = number
            self._noted.notify()

    def stop(self) -> None:
        """Answer nothing any more."""
        with self._noted:
            self._copy = None
            self._noted.notify()
        self._questions.put(QUESTION.pack(0, 0, 0))

    def join(self) -> None:
        """After `stop`, return when the copy under way has ended, and the leader knows."""
        self._thread.join()

    def _answer_all(self) -> None:
        try:
            while True:
                question = self._questions.take(QUESTION.size)
                if not self._copy:
                    return
                self._answer(*QUESTION.unpack(question))
        finally:
            self._say(CLOSED)

    def _answer(self, request_id: int, number: int, until: float) -> None:
        copy = self._wait_for(number, until)
        self._say(BEGINS)  # before the look at the clock: who is in time is waited for
        said = FAILED
        try:
            if copy and time.monotonic() < until:
                copy(request_id)
                said = COPIED
        finally:
            self._say(said)

    def _wait_for(self, number: int, until: float) -> Callable[[int], None] | None:
        """What copies what a pass is to store, once that is known; None if it is not in time."""
        with self._noted:
            left = until - time.monotonic()
            self._noted.wait_for(lambda: self.number >= number or not self._copy, max(left, 0))
            return self._copy if self.number >= number else None

    def _say(self, what: int) -> None:
        self._answers.put(ANSWER.pack(self._rank, what))


class Asker:
    """The leader's end. For one thread."""

    def __init__(self, engine_id: str, ranks: int, beside: Answerer) -> None:
        """`beside` is that of the leader's own rank. Raises `LayoutError` without pipes."""
        self._beside = beside
        self._questions = [_Pipe(engine_id, rank) for rank in range(ranks)]
        self._answers = _Pipe(engine_id, "answers")
        self._owing: set[int] = set()
        """Ranks that have been asked and have not answered."""
        self._begun: set[int] = set()
        """Those of them that have begun."""
        self._copied = 0
        """How many have copied what they were asked about last."""
        self._missed = 0
        """The last pass that a rank did not copy all of."""
        self._has_lost = False
        """Whether one has closed."""

    def ask(self, request_id: int, number: int) -> bool:
        """Have all ranks copy what they are to store of a request; whether all of them have.

        `number` is the pass that is the last to store something of it.
        When this returns, none of them reads its blocks, or will. Nobody is asked while a rank
        that was stuck has not answered, nor about a pass that failed, or that one has missed.
        """
        self._hear(0)
        is_too_late = self._missed >= number or self._beside.number < number
        if self._owing or self._has_lost or is_too_late:
            return False
        until = time.monotonic() + BEGIN_S
        question = QUESTION.pack(request_id, number, until)
        self._owing, self._copied = set(range(len(self._questions))), 0
        for pipe in self._questions:
            pipe.put(question)
        while self._owing - self._begun and (left := until - time.monotonic()) > 0:
            self._hear(left)
        self._hear(0)  # who has begun in time has said so by now
        while self._begun:
            self._hear(None)
        if self._copied == len(self._questions):
            return True
        self._missed = number
        logger.warning("not stored: a rank was not ready to copy blocks of request %d", request_id)
        return False

    def _hear(self, timeout_s: float | None) -> None:
        """Take what answers there are, or the first that comes in time."""
        while self._answers.has_some(timeout_s):
            timeout_s = 0
            rank, said = ANSWER.unpack(self._answers.take(ANSWER.size))
            if said == BEGINS:
                self._begun.add(rank)
                continue
            self._begun.discard(rank)
            self._owing.discard(rank)
            self._copied += said == COPIED
            self._has_lost |= said == CLOSED
