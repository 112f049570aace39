"""What a fake model writes into its pages instead of KV: words that tell where they belong.

The word of a token depends on every token before it, on what else the model was shown, and on
layer,
head and rank; so two pages are equal only where a real model's would be.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

MIX = np.uint64(0x9E3779B97F4A7C15)
FIRST_OUTPUT, OUTPUTS = 100, 800


def link(previous: int, token: int, shown: str) -> int:
    """The code of a token after a token with the code `previous`."""
    body = struct.pack("<QQ", previous, token) + shown.encode()
    return int.from_bytes(hashlib.blake2b(body, digest_size=8).digest(), "little")


class Codes:
    """The codes of one sequence, which may grow and shrink at its end."""

    def __init__(self, lora: str = "", images: Sequence[tuple[str, int, int]] = ()) -> None:
        self._root = link(0, 0, lora)
        self._images = images
        self._tokens: list[int] = []
        self._codes: list[int] = []

    def upto(self, tokens: Sequence[int]) -> np.ndarray:
        """One code for each of `tokens`."""
        same = 0
        while same < min(len(tokens), len(self._tokens)) and tokens[same] == self._tokens[same]:
            same += 1
        del self._tokens[same:], self._codes[same:]
        for position in range(same, len(tokens)):
            previous = self._codes[-1] if self._codes else self._root
            shown = "".join(
                f"{name}@{position - start}"
                for name, start, length in self._images
                if start <= position < start + length
            )
            self._tokens.append(tokens[position])
            self._codes.append(link(previous, tokens[position], shown))
        return np.array(self._codes, dtype=np.uint64)


def words(codes: np.ndarray, layer: int, rank: int, heads: int, per_head: int) -> np.ndarray:
    """What a layer holds of these tokens: (tokens, heads, words)."""
    place = np.arange(heads * per_head, dtype=np.uint64).reshape(heads, per_head)
    place += np.uint64(1 + 1000 * layer + 1_000_000 * rank)
    with np.errstate(over="ignore"):
        return codes[:, None, None] * MIX + place * (MIX ^ np.uint64(layer + 1))


def sample(code: int) -> int:
    """The token that a sequence whose last token has this code goes on with."""
    return FIRST_OUTPUT + code % OUTPUTS


def continuation(prompt: Sequence[int], count: int, **shown) -> list[int]:
    """The outputs of a model without a cache."""
    codes, tokens = Codes(**shown), list(prompt)
    for _ in range(count):
        tokens.append(sample(int(codes.upto(tokens)[-1])))
    return tokens[len(prompt) :]
