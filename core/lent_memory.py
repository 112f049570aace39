"""An engine's pages in memory that another process can map, and that can be taken back.

Taking back puts other memory with the same content at the same addresses: whoever has the old
memory mapped keeps it, and what it writes there is nobody's. So a copier that stopped half-way can
be left behind without a page of the engine being at its mercy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.errors import LayoutError
from lmcache.core.frames import MAX_DESCRIPTORS
from lmcache.core.handover import CHANNELS, Lending
from lmcache.core.slab import anonymous_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from lmcache.core.layout import PageLayout

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


class Span(NamedTuple):
    """One mapping and the descriptor that stands for it."""

    address: int
    length: int
    fd: int
    """The tensor library's own; what it stands for changes when the memory is taken back."""


class LentMemory:
    """The memory of some tensors of a CPU."""

    takes_back_at_once = False

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Moves the tensors, and all others of their storages, to memory that can be shared.

        Call it before any address of theirs is kept. Raises `LayoutError` if that cannot be.
        """
        self._storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        if len(self._storages) + CHANNELS > MAX_DESCRIPTORS:
            raise LayoutError(f"the pages lie in {len(self._storages)} pieces of memory")
        self.spans: list[Span] = []
        for storage in self._storages.values():
            if storage.device.type != "cpu":
                raise LayoutError(
                    f"memory of a {storage.device.type} cannot be lent: use engine_driven"
                )
            try:
                fd, length = storage._share_fd_cpu_()
            except RuntimeError as error:
                raise LayoutError(
                    f"no shared memory for the pages: {error}; give /dev/shm more room, or use "
                    "engine_driven"
                ) from error
            self.spans.append(Span(storage.data_ptr(), length, fd))

    def lend(self, layout: PageLayout, visitor: int) -> tuple[Lending, list[int]]:
        """What to say to a visitor, whoever it is, and the descriptors to send with it."""
        del visitor
        spans = [(span.address, span.length) for span in self.spans]
        return Lending(layout=layout, spans=spans), [span.fd for span in self.spans]

    def mark(self) -> None:
        """What the engine has written is there."""

    def take_back(self) -> None:
        """Be rid of whoever has the memory mapped. No thread may use the tensors meanwhile."""
        for span in self.spans:
            _renew(span)


def _renew(span: Span) -> None:
    fd = anonymous_file(span.length)
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        fresh = stack.enter_context(mmap.mmap(fd, span.length))
        first = ctypes.c_char.from_buffer(fresh)
        ctypes.memmove(ctypes.addressof(first), span.address, span.length)
        del first
        _map_at(span.address, span.length, fd)
        os.dup2(fd, span.fd, inheritable=False)


def _map_at(address: int, length: int, fd: int) -> None:
    found = _libc.mmap(
        ctypes.c_void_p(address),
        ctypes.c_size_t(length),
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_SHARED | _MAP_FIXED,
        fd,
        ctypes.c_long(0),
    )
    if found == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot map {length} bytes: {os.strerror(error)}")
