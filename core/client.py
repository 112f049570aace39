"""The one interface between an engine's scheduler and the cache, wherever the decider lives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache.core.chain import KeyChain
from lmcache.core.fetch import PLAIN, Asking
from lmcache.core.keys import root_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.decider import Hit
    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot
    from lmcache.core.keys import Identity, Insert, Namespace
    from lmcache.core.receipts import Reason


class CacheClient(ABC):
    """One engine's side of a decider, while it is attached. Called on the scheduler's thread.

    What it plans goes to the movers with the engine's own step, under the number `depart` gave it.
    """

    geometry: Geometry
    number: int
    """Tells it from every other attachment of the engine: a step names it."""

    def chain(
        self,
        namespace: Namespace,
        identity: Identity,
        tokens: Sequence[int],
        inserts: Sequence[Insert] = (),
    ) -> KeyChain:
        """The keys of `tokens` here; the layout of `namespace` is this engine's."""
        geometry = self.geometry
        return KeyChain(
            root_key(replace(namespace, layout=geometry.layout.hex()), identity),
            tokens,
            page_tokens=geometry.page_tokens,
            pages_per_chunk=geometry.pages_per_chunk,
            inserts=inserts,
        )

    @abstractmethod
    def lookup(self, owner: str, chain: KeyChain, stop: int, asking: Asking = PLAIN) -> Hit | None:
        """Lease the longest stored stretch of the tokens up to `stop`; None to be asked again.

        Slower tiers are asked once for each owner, until `release`, or until its loads depart.
        """

    @abstractmethod
    def keeps(self, hit: Hit, *, promised: bool = False) -> bool:
        """Whether the lease of `hit` has not ended.

        With `promised` the engine counts on the load: no deadline ends it from now on.
        """

    @abstractmethod
    def release(self, owner: str, hit: Hit | None) -> None:
        """The owner wants nothing more of what it looked up. More than once does nothing."""

    @abstractmethod
    def reserve(
        self, chain: KeyChain, start: int, stop: int, *, tail: bool
    ) -> tuple[list[Slot], Reason]:
        """Slots for what of tokens `start` .. `stop` is not stored; `depart` or `cancel` them.

        `start` is rounded down to a chunk. With `tail`, a last chunk of fewer pages counts too.
        """

    @abstractmethod
    def depart(self, stores: Sequence[Slot], loads: Sequence[Hit]) -> int:
        """Put a step in the air; its number, 0 if it is empty. Every mover must be sent it.

        To be called for empty steps too: it takes note of those that have landed.
        """

    @abstractmethod
    def cancel(self, stores: Sequence[Slot], loads: Sequence[Hit]) -> None:
        """The step that was to hold these will not be sent."""
