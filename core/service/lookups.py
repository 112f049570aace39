"""An engine's lookups that have no answer yet, each asked with as few bytes as will do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.errors import LateError, ServiceError
from lmcache.core.service import wire

if TYPE_CHECKING:
    from lmcache.core.chain import KeyChain
    from lmcache.core.fetch import Asking
    from lmcache.core.service.link import Link
    from lmcache.core.service.told import Told


class Question(NamedTuple):
    """What an owner wants to know."""

    owner: str
    chain: KeyChain
    stop: int
    asking: Asking


@dataclass
class _Asked:
    number: int
    deadline: float


class Lookups:
    """By owner, who has one at a time. Not for several threads at once."""

    def __init__(self, link: Link, told: Told, about: wire.Attached, deadline_s: float) -> None:
        """An answer that takes longer than `deadline_s` is given up."""
        self._link = link
        self._told = told
        self._about = about
        self._deadline_s = deadline_s
        self._asked: dict[str, _Asked] = {}
        self._owners: set[str] = set()

    def answer(self, question: Question, wait_s: float) -> wire.Found | None:
        """Ask, unless that is done; None if there is no answer within `wait_s`.

        Raises `LateError` if it has taken too long, `ServiceError` if none will come.
        """
        owner = question.owner
        asked = self._asked.get(owner) or self._ask(question)
        answer = self._link.poll(asked.number, wait_s)
        if isinstance(answer, wire.Lacking):
            self.end(owner)
            asked = self._wait_for(owner, self._begin(question))
            answer = self._link.poll(asked.number, wait_s)
        if isinstance(answer, wire.Found):
            self.end(owner)
            return answer
        if isinstance(answer, wire.Fetching):
            asked.deadline = time.monotonic() + self._about.fetch_timeout_s + self._deadline_s
            return None
        self._give_up(owner, asked, answer)
        return None

    def end(self, owner: str) -> None:
        """Nobody waits for an answer any more; one that comes is given back."""
        if asked := self._asked.pop(owner, None):
            self._link.end(asked.number)

    def leave(self, owner: str) -> bool:
        """The owner asks nothing more; whether the server has heard of it."""
        self.end(owner)
        is_known = owner in self._owners
        self._owners.discard(owner)
        return is_known

    # ----

    def _ask(self, question: Question) -> _Asked:
        # a guess would be read from slower tiers, and what is right would have to wait for that
        number = self._begin(question, brief=not self._about.has_tiers)
        is_so = False
        try:
            is_so = self._told.confirm(question.chain, question.stop)
        finally:
            if not is_so:  # the lease that it brings is given back
                self._link.end(number)
        return self._wait_for(question.owner, number if is_so else self._begin(question))

    def _begin(self, question: Question, *, brief: bool = False) -> int:
        if not self._link.is_up():  # before anything counts as told
            raise ServiceError("the server does not answer")
        sequence, more = self._told.tell(question.chain, question.stop, brief=brief)
        owner, _, stop, asking = question
        self._owners.add(owner)
        call = wire.Lookup(owner=owner, sequence=sequence, more=more, stop=stop, **asking._asdict())
        return self._link.begin(call)

    def _wait_for(self, owner: str, number: int) -> _Asked:
        asked = self._asked[owner] = _Asked(number, time.monotonic() + self._deadline_s)
        return asked

    def _give_up(self, owner: str, asked: _Asked, answer: wire.Reply | None) -> None:
        """Unless an answer may still come. Raises `LateError` or `ServiceError`."""
        is_late = time.monotonic() >= asked.deadline
        if answer is None and not is_late and not self._link.is_lost:
            return
        self.end(owner)
        if is_late:
            self._link.late()
            raise LateError(f"no answer from {self._link.endpoint} to a lookup")
        raise ServiceError(f"no answer from {self._link.endpoint} to a lookup")
