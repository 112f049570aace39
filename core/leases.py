"""The right to read slots: owned by one request, with a deadline."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_numbers = itertools.count(1)


@dataclass(eq=False)
class Lease:
    """While it is held, its entries stay where they are."""

    owner: str
    entries: list[int]
    deadline: float
    in_flight: bool = False
    """Handed to a mover: from now on no deadline ends it, only the mover or its death."""
    number: int = field(default_factory=_numbers.__next__)


class Leases:
    """All leases of one decider."""

    def __init__(self) -> None:
        self._held: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, lease: object) -> bool:
        return isinstance(lease, Lease) and lease.number in self._held

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._held.values()))

    def add(self, lease: Lease) -> None:
        """Hold `lease`."""
        self._held[lease.number] = lease

    def take(self, lease: Lease) -> bool:
        """Stop holding it; False if it is gone already, by release or by deadline."""
        return self._held.pop(lease.number, None) is not None

    def expired(self, now: float) -> list[Lease]:
        """Leases past their deadline that no mover holds, oldest first."""
        late = []
        for lease in self._held.values():
            if not lease.in_flight:
                if lease.deadline > now:
                    break
                late.append(lease)
        return late
