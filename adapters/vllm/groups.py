"""vLLM's cache groups: the pages that hold the same tokens, and which of them are still there.

Some layers look at all tokens before, some only so far back. vLLM gives each kind a page table of
its own over one pool of pages, and takes back the pages that no later token looks at. So a chunk is
stored with the step that computes its last token: what is missing of it then, whoever continues
from the end of this chunk or of a later one does not look at either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache.core.errors import LayoutError
from lmcache.core.mover import HOLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Tables = list[list[int]]
"""The page tables of a request, one for each cache group."""

NULL_PAGE = 0
"""vLLM's block 0 stands for "no block"; its content is nobody's."""

_KEPT_WHOLE = ("FullAttentionSpec", "MLAAttentionSpec")
"""Cache specs whose groups keep every page of a request until its end."""
_WINDOWED = ("SlidingWindowSpec",)
"""Those that keep the pages of the last tokens. All others keep or share pages in ways of their
own, of which vLLM tells the connector nothing."""


@dataclass(frozen=True)
class Groups:
    """The cache groups of an engine."""

    windows: tuple[int | None, ...] = (None,)
    """How many tokens the next one looks back to, itself included; None for all."""

    @property
    def keep_all(self) -> bool:
        """Whether there is one group, and it keeps all pages: then each page is for itself."""
        return self.windows == (None,)

    def kept(self, tables: Tables, computed: int, page_tokens: int) -> Tables:
        """The tables with holes for what vLLM may have taken back when `computed` tokens were."""
        if self.keep_all:
            return tables
        kept = []
        for table, window in zip(tables, self.windows, strict=True):
            gone = 0 if window is None else max(0, computed + 1 - window) // page_tokens
            kept.append([*[HOLE] * min(gone, len(table)), *_with_holes(table[gone:])])
        return kept

    def granted(self, tables: Tables) -> Tables:
        """The tables of a request that waits for its pages, with holes for what it won't get."""
        return tables if self.keep_all else [_with_holes(table) for table in tables]

    def __str__(self) -> str:
        return ",".join("all" if window is None else f"last {window}" for window in self.windows)


def groups_of(kv_cache_config: Any) -> Groups:
    """The cache groups. Raises `LayoutError` for those whose pages cannot be restored."""
    groups = kv_cache_config.kv_cache_groups
    sizes = sorted({group.kv_cache_spec.block_size for group in groups})
    if len(sizes) != 1:
        raise LayoutError(f"cache groups with pages of {sizes} tokens")
    windows: list[int | None] = []
    for group in groups:
        spec = group.kv_cache_spec
        found = {
            _window_of(member) for member in getattr(spec, "kv_cache_specs", {"": spec}).values()
        }
        if len(found) != 1:
            raise LayoutError(f"a cache group whose layers look back differently far: {found}")
        windows.append(found.pop())
    return Groups(tuple(windows))


def tables_of(block_ids: Iterable[Sequence[int]]) -> Tables:
    """Page tables of our own."""
    return [list(ids) for ids in block_ids]


def joined(tables: Tables, fresh: Iterable[Sequence[int]]) -> Tables:
    """The tables with what a step adds to them."""
    if not tables:
        return tables_of(fresh)
    return [old + list(new) for old, new in zip(tables, fresh, strict=True)]


def _window_of(spec: Any) -> int | None:
    kind = type(spec).__name__
    if kind in _KEPT_WHOLE:
        return None
    if kind in _WINDOWED:
        return int(spec.sliding_window + getattr(spec, "extra_retained_tokens", 0))
    raise LayoutError(
        f"a KV cache of {kind} does not keep the pages of a request; "
        f"known: {', '.join(_KEPT_WHOLE + _WINDOWED)}"
    )


def _with_holes(table: Sequence[int]) -> list[int]:
    return [HOLE if page == NULL_PAGE else page for page in table]
