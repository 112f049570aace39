"""The server's side of every engine: lets them in, answers them, and cleans up after them.

It knows no socket: frames go in, frames come out. All but the visits of new engines happens on one
thread, so nothing here needs a lock of its own.
"""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.attachment import Attachment
from lmcache.core.errors import LMCacheError, ServiceError
from lmcache.core.log import init_logger
from lmcache.core.pool import DaemonPool
from lmcache.core.service import wire
from lmcache.core.service.memo import Memo
from lmcache.core.service.sequences import Sequences, UnknownError
from lmcache.core.service.session import Session
from lmcache.core.slab import MAX_MOVERS, MOVER_BYTES, WORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Decider
    from lmcache.core.tiers import Tiers

logger = init_logger(__name__)

MEMO_TOKENS = 8 << 20
"""32 MiB, and with small chunks as much again for their keys."""
VISIT_S = 5.0
"""How long the movers of a new engine may take to answer."""
LEAVE_S = 5.0
"""How long a new attachment of an engine waits for the movers of its last one to let go."""


@dataclass(frozen=True)
class Terms:
    """What the server offers, and to whom."""

    chunk_size: int
    modes: tuple[str, ...]
    fetch_timeout_s: float
    lease_s: float
    token: str = ""
    """What an engine must know to be let in; empty if anyone may."""
    release: str = ""


class Visited(NamedTuple):
    """What became of visiting an engine's movers."""

    peer: int
    call: wire.Call
    about: wire.Attach
    words: list[int]
    result: Attachment | LMCacheError


class Service:
    """Shares one decider and its tiers among engines."""

    def __init__(
        self, decider: Decider, tiers: Tiers, terms: Terms, wake: Callable[[], None]
    ) -> None:
        """`wake()` is called on some thread when `due` has something to say."""
        self.decider = decider
        self.tiers = tiers
        self.terms = terms
        self.boot = secrets.token_bytes(32)
        self.sessions: dict[int, Session] = {}
        self.leaving: list[Session] = []
        """Of engines that are gone, whose movers may still touch the slab."""
        self._memo: Memo[KeyChain] = Memo(MEMO_TOKENS)
        self._words = set(range(MAX_MOVERS))
        self._wake = wake
        self._visited: SimpleQueue[Visited] = SimpleQueue()
        self._visitors = DaemonPool(4, "lmcache-visitor")

    # ---- calls

    def handle(self, peer: int, data: bytes | memoryview) -> bytes | None:
        """Answer one frame; None if no answer is due, or none yet."""
        try:
            call = wire.decode_call(data)
        except ServiceError as error:
            return self._turn_away(data, error)
        try:
            body = self._answer(peer, call)
        except Exception:
            logger.exception("cannot answer %s", type(call.body).__name__)
            if call.session in self.sessions:
                self._end(self.sessions[call.session], "met an error of ours")
            body = wire.Refused("an error of the server's own; its log has more")
        return self._frame(call.number, body) if body else None

    def _answer(self, peer: int, call: wire.Call) -> wire.Reply | None:
        if isinstance(call.body, wire.Attach):
            return self._attach(peer, call, call.body)
        session = self.sessions.get(call.session)
        if isinstance(call.body, wire.Ping) and (session or not call.session):
            return wire.Pong(self.terms.release)
        if session is None:
            return wire.Unknown("session")
        session.peer = peer
        return self._answer_session(session, call)

    def _answer_session(self, session: Session, call: wire.Call) -> wire.Reply | None:
        if isinstance(call.body, wire.Detach):
            self._end(session, "left")
            return None
        if isinstance(call.body, wire.Lookup):
            self.settle()  # what another engine has just stored counts
        try:
            return session.answer(call.number, call.body)
        except UnknownError as error:
            self._end(session, f"spoke of {error}")
            return wire.Unknown(str(error))
        except (LMCacheError, OverflowError, TypeError) as error:
            self._end(session, f"cannot be served: {error}")
            return wire.Refused(str(error)[: wire.MAX_TEXT])

    def _turn_away(self, data: bytes | memoryview, error: ServiceError) -> bytes | None:
        """What cannot be read is not answered, but for an engine of another release."""
        foreign = wire.foreign_protocol(data)
        if foreign is None:
            logger.warning("dropping a message: %s", error)
            return None
        number, protocol = foreign
        return self._frame(number, self._foreign(protocol))

    def _foreign(self, protocol: int) -> wire.Refused:
        why = (
            f"this server ({self.terms.release}) speaks protocol {wire.PROTOCOL}, "
            f"the engine speaks {protocol}: install one release of lmcache on both sides"
        )
        return wire.Refused(why, final=True)

    def _frame(self, number: int, body: wire.Reply) -> bytes | None:
        return wire.encode(wire.Answer(number, self.boot, body)) if number else None

    # ---- coming

    def _attach(self, peer: int, call: wire.Call, about: wire.Attach) -> wire.Reply | None:
        if about.protocol != wire.PROTOCOL:
            return self._foreign(about.protocol)
        if not hmac.compare_digest(about.token.encode(), self.terms.token.encode()):
            return wire.Refused("the token is not the server's", final=True)
        if about.chunk_size not in (None, self.terms.chunk_size):
            why = (
                f"the server's chunks are {self.terms.chunk_size} tokens, "
                f"the engine was told to use {about.chunk_size}"
            )
            return wire.Refused(why, final=True)
        mode = "engine_driven" if about.mode == "auto" else about.mode
        if mode not in self.terms.modes:
            why = f"the engine wants {mode}, the server does {' or '.join(self.terms.modes)}"
            return wire.Refused(why, final=True)
        if len(self._words) < about.movers:
            return wire.Refused(f"{MAX_MOVERS} movers are attached already")
        earlier = [s for s in self.sessions.values() if s.about.engine == about.engine]
        for session in earlier:
            self._end(session, "attaches anew")
        before = [s for s in self.leaving if s.about.engine == about.engine]
        words = [self._words.pop() for _ in range(about.movers)]
        self._visitors.submit(self._visit, peer, call, about, words, before)
        return None

    def _visit(
        self,
        peer: int,
        call: wire.Call,
        about: wire.Attach,
        words: list[int],
        before: Sequence[Session],
    ) -> None:
        """Meet the movers, on a thread that may wait for them."""
        result: Attachment | LMCacheError
        try:
            deadline = time.monotonic() + LEAVE_S
            while not all(session.attachment.is_silent() for session in before):
                if time.monotonic() > deadline:
                    raise ServiceError("the engine's movers still use the slab")
                time.sleep(0.01)
            for word in words:
                self.decider.slab.write_word(word * MOVER_BYTES, 0)
                self.decider.slab.write_word(word * MOVER_BYTES + WORD.size, 0)
            result = Attachment.open(
                about.engine,
                about.movers,
                self.terms.chunk_size,
                lambda _: (self.decider, self.tiers),
                VISIT_S,
                words=words,
            )
        except LMCacheError as error:
            result = error
        except OSError as error:  # e.g. no descriptor left
            result = ServiceError(f"cannot visit the movers: {error}")
        except Exception as error:  # of a GPU's libraries, say: its words must come back
            logger.exception("cannot visit the movers of %s", about.name)
            result = ServiceError(f"cannot visit the movers: {error!r}")
        self._visited.put(Visited(peer, call, about, words, result))
        self._wake()

    def _admit(self, visited: Visited) -> wire.Reply:
        if isinstance(visited.result, LMCacheError):
            self._words.update(visited.words)
            return wire.Refused(str(visited.result)[: wire.MAX_TEXT])
        attachment = visited.result
        sequences = Sequences(attachment.geometry, self._memo)
        session = Session(visited.about, attachment, visited.words, visited.peer, sequences)
        self.sessions[session.number] = session
        geometry = attachment.geometry
        logger.info(
            "%s attached: %d movers, chunks of %d tokens, %.1f MiB each",
            visited.about.name,
            visited.about.movers,
            geometry.chunk_tokens,
            geometry.slot_bytes(geometry.pages_per_chunk) / (1 << 20),
        )
        return wire.Attached(
            session=session.number,
            page_tokens=geometry.page_tokens,
            pages_per_chunk=geometry.pages_per_chunk,
            slices=list(geometry.slices),
            layout=geometry.layout,
            lease_s=self.terms.lease_s,
            fetch_timeout_s=self.terms.fetch_timeout_s,
            capacity_bytes=self.decider.capacity_bytes,
            has_tiers=len(self.tiers) > 0,
        )

    # ---- what nobody asked for just now

    def due(self) -> Iterator[tuple[int, bytes]]:
        """Answers that have become possible, each with the peer it is for."""
        while True:
            try:
                visited = self._visited.get_nowait()
            except Empty:
                break
            if frame := self._frame(visited.call.number, self._admit(visited)):
                yield visited.peer, frame
        for session in self.sessions.values():
            for number, found in session.late():
                if frame := self._frame(number, found):
                    yield session.peer, frame

    def is_fetching(self) -> bool:
        """Whether a lookup waits for a slower tier."""
        return any(session.waiting for session in self.sessions.values())

    def is_copying(self) -> bool:
        """Whether a step waits for its movers."""
        return any(len(session.attachment.flights) for session in self.sessions.values())

    def settle(self) -> None:
        """Take note of the steps whose movers are done."""
        for session in self.sessions.values():
            session.attachment.flights.settle()

    def sweep(self) -> None:
        """Take note of engines that died, and free what nobody touches any more."""
        self.settle()
        for session in list(self.sessions.values()):
            if not session.attachment.is_whole():
                self._end(session, "lost a mover")
        for session in [s for s in self.leaving if s.attachment.is_silent()]:
            self.leaving.remove(session)
            session.end()
            self._words.update(session.words)

    def close(self) -> None:
        """Let every engine go, and wait for their movers for a while."""
        for session in list(self.sessions.values()):
            self._end(session, "is let go")
        deadline = time.monotonic() + LEAVE_S
        while self.leaving and time.monotonic() < deadline:
            self.sweep()
            time.sleep(0.01)
        self._visitors.close()

    def _end(self, session: Session, why: str) -> None:
        """Its memory is free as soon as its movers are silent."""
        logger.info("%s %s", session.about.name, why)
        del self.sessions[session.number]
        session.attachment.leave()
        self.leaving.append(session)
