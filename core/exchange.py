"""What engines of different kinds share: the keys and values of each token, in one order.

Two engines compute the same only up to rounding, and nothing here can tell one set of weights from
another. So nothing is shared unless a user names an exchange, on both sides alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmcache.core.errors import HandoverError, LayoutError
from lmcache.core.keys import Namespace

DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
"""A smaller one may be quantized in more than one way."""
_MARK = "exchange v1"


@dataclass(frozen=True)
class Content:
    """What an object of an exchange holds: keys, then values, of one layer after the other.

    Of each, all tokens follow each other, and of a token all heads.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: str
    itemsize: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise LayoutError(f"an exchange is for {', '.join(DTYPES)}, not for {self.dtype}")

    @property
    def row_bytes(self) -> int:
        """Keys, or values, of one token in one layer."""
        return self.heads * self.head_dim * self.itemsize

    @property
    def summary(self) -> str:
        """The same for every engine, whatever its pages are."""
        rows = f"{2 * self.layers} x {self.row_bytes} {self.dtype} [{self.heads}, {self.head_dim}]"
        return f"{_MARK}\n{rows}"


def exchange_namespace(name: str, generation: str) -> Namespace:
    """The namespace of an exchange, but for the content, which is the layout of its objects."""
    return Namespace(
        model=f"exchange/{name}", generation=generation, dtype="", layout="", parallel=""
    )


def check_chunks(summary: str, chunk_size: int, page_tokens: int) -> None:
    """Raise `HandoverError` if chunks of an exchange are not of one size on all engines."""
    if summary.startswith(_MARK) and chunk_size % page_tokens:
        raise HandoverError(
            f"chunks of {chunk_size} tokens are no whole pages of {page_tokens}: in an exchange "
            "all engines need chunks of the same size; choose another chunk_size"
        )


def check_alone(ranks: int) -> None:
    """Raise `LayoutError` for an engine of several ranks, each of which has a part of a token."""
    if ranks > 1:
        raise LayoutError(f"an exchange is for engines of one rank, this one has {ranks}")
