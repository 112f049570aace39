"""Copies between an engine's pages and the slab, where the pages are. Decides nothing.

A mover keeps no state that a restart would miss: each instruction says where a slot lies, which
generation it must have and which pages it is for.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.gate import Gate
from lmcache.core.kernels.host import HostPages
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.slab import CONTROL_BYTES, MOVER_BYTES, WORD
from lmcache.core.warming import Warmer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lmcache.core.geometry import Geometry
    from lmcache.core.kernels.copier import PageCopier
    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout
    from lmcache.core.slab import Slab


HOLE = -(1 << 31)
"""In place of a page id: nothing is copied there, and nothing will ever be looked for there."""


class Move(NamedTuple):
    """Copy some pages of one slot. Plain integers, which cross processes with the engine's data.

    A slot holds its pages for the engine's first cache group, then those for the second, and so on.
    """

    offset: int
    """Where the slot lies in the slab."""
    generation: int
    slot_pages: int
    """Pages of each cache group in the whole slot."""
    first: int
    """The first page of the slot to copy."""
    pages: list[int]
    """Engine page ids, and holes."""

    @property
    def engine_pages(self) -> list[int]:
        """The pages that are copied."""
        return [page for page in self.pages if page != HOLE]


def pages_of(moves: Iterable[Move]) -> list[int]:
    """The engine's pages that these moves copy."""
    return [page for move in moves for page in move.engine_pages]


class Mover:
    """Copies one slice of every page, for one worker."""

    def __init__(
        self,
        layout: PageLayout,
        geometry: Geometry,
        slab: Slab,
        *,
        number: int = 0,
        slice_index: int = 0,
        writes: bool = True,
        copier: PageCopier | None = None,
        threads: int = 2,
    ) -> None:
        """`number` says which word of the slab is ours.

        Without a `copier`, the pages are in this machine's memory, and `threads` copy them.
        `writes` is False where another mover stores the same bytes.
        """
        self.layout = layout
        self._geometry = geometry
        self._slab = slab
        self._number = number
        self._slice = slice_index
        self._writes = writes
        self._pages = copier or HostPages(Planner(layout), slab, threads)
        self._warmer = Warmer(slab, stay_near=self._pages.stay_near)
        self._gate = Gate()

    def mark(self) -> Event | None:
        """A point for `after`: all that the engine has done to its pages, or queued on a device.

        To be asked for on the engine's own thread. If it is not None, copies may be made on others.
        """
        return self._pages.mark()

    def store(
        self, moves: Sequence[Move], region: int | None = None, after: Event | None = None
    ) -> int:
        """Copy pages into slots; returns the bytes copied. `publish` makes the slots complete."""
        with self._gate.passage() as admitted:
            if not admitted or not self._writes or not moves:
                return 0
            size = self._copy(moves, region, after, to_slab=True)
        self._warmer.used(max(m.offset + self._geometry.slot_bytes(m.slot_pages) for m in moves))
        return size

    def publish(self, moves: Sequence[Move]) -> None:
        """Every region of `moves` has been stored. A slot not stored whole stays incomplete."""
        with self._gate.passage() as admitted:
            for move in moves if admitted and self._writes else ():
                if len(move.pages) == move.slot_pages * self.layout.groups:
                    self._slab.write_word(self._tag(move), move.generation)

    def load(
        self, moves: Sequence[Move], region: int | None = None, after: Event | None = None
    ) -> tuple[int, list[Move]]:
        """Copy slots into pages: bytes copied, and the moves whose slot was not what was promised.

        The pages of a failed move hold garbage. With `region`, only that one is copied.
        """
        with self._gate.passage() as admitted:
            good = [move for move in moves if admitted and self._is_there(move)]
            size = self._copy(good, region, after, to_slab=False)
            intact = {id(move) for move in good if self._is_there(move)}
        return size, [move for move in moves if id(move) not in intact]

    def finish(self, step: int) -> None:
        """Tell the decider that every copy of `step` has ended, one way or the other."""
        self._write_word(self._number * MOVER_BYTES, step)

    def spoil(self, step: int) -> None:
        """What any mover stored in `step` may have been computed from pages without content.

        To be said before `finish`; nothing stored up to that step and not yet settled is kept.
        """
        self._write_word(self._number * MOVER_BYTES + WORD.size, step)

    def retire(self) -> None:
        """Leave the slab alone: returns when the copy under way has ended, and all others fail."""
        self._gate.shut()

    def close(self) -> None:
        """End the threads and unmap the slab."""
        self.retire()
        self._warmer.close()
        self._pages.close()
        self._slab.close()

    def _write_word(self, offset: int, value: int) -> None:
        with self._gate.passage() as admitted:
            if admitted:
                self._slab.write_word(offset, value)

    def _tag(self, move: Move) -> int:
        return self._inside(move) + self._geometry.tag_offset(self._slice)

    def _is_there(self, move: Move) -> bool:
        return self._slab.read_word(self._tag(move)) == move.generation

    def _copy(
        self, moves: Sequence[Move], region: int | None, after: Event | None, *, to_slab: bool
    ) -> int:
        if not moves:
            return 0
        spans = [span for move in moves for span in self._spans(move)]
        return self._pages.copy(spans, region, to_slab=to_slab, after=after)

    def _inside(self, move: Move) -> int:
        last = move.offset + self._geometry.slot_bytes(move.slot_pages)
        if move.offset < CONTROL_BYTES or last > self._slab.size:
            raise IndexError(f"slot at {move.offset} lies outside the slab")
        return move.offset

    def _spans(self, move: Move) -> Iterator[Span]:
        payload = self._inside(move) + self._geometry.payload_offset(self._slice, move.slot_pages)
        stored, first = move.slot_pages * self.layout.groups, move.first
        if HOLE not in move.pages:  # as nearly always
            yield Span(payload, stored, first, move.pages)
            return
        for is_hole, part in groupby(move.pages, HOLE.__eq__):
            pages = list(part)
            if not is_hole:
                yield Span(payload, stored, first, pages)
            first += len(pages)
