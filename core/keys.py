"""What a stored chunk is called.

A key is a chain of blake3 digests: root = H(namespace, request identity), key_i = H(key_{i-1},
tokens of chunk i, what else the chunk shows the model). Every field is tagged and
length-prefixed, so that no two different inputs share an encoding. Python's `hash` is not used;
`docs/keys.md` specifies the bytes and `tests/core/test_keys.py` pins them.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NewType

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ChunkKey = NewType("ChunkKey", bytes)
"""32 bytes: two chunks share a key exactly when they may share KV bytes."""

SCHEMA = 1
"""Version of the key schema; part of every key."""

_COUNT = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Everything about a deployment that makes KV bytes not interchangeable."""

    model: str
    """Model id, with revision and whatever else selects its weights."""
    generation: str = ""
    """Weight generation: bump it to make everything stored before unreachable."""
    dtype: str
    """Element type of the KV cache, as the engine names it."""
    layout: str
    """Layout fingerprint (see `lmcache.core.layout`)."""
    group: int = 0
    """Cache group of the engine."""
    parallel: str = ""
    """The parallel slices whose bytes an object holds, e.g. `tp2.pp1`."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything about one request, besides its tokens, that changes its KV bytes."""

    lora: str = ""
    """LoRA adapter: name and version."""
    salt: str = ""
    """Cache salt; requests with different salts never share."""


@dataclass(frozen=True)
class Insert:
    """A stretch of placeholder tokens that stands for something else, e.g. an image."""

    identifier: str
    """Content hash of what is shown there, at full width."""
    offset: int
    """First token position."""
    length: int
    """Number of token positions."""


def _field(tag: str, value: bytes) -> bytes:
    name = tag.encode()
    return struct.pack("<BQ", len(name), len(value)) + name + value


def _encode(record: object) -> bytes:
    parts = []
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        raw = b"i" + struct.pack("<q", value) if isinstance(value, int) else b"s" + value.encode()
        parts.append(_field(f"{type(record).__name__}.{field.name}", raw))
    return b"".join(parts)


def digest_of(traits: object) -> str:
    """32 hex digits over whatever else of a deployment tells its KV apart, for a `Namespace`."""
    text = json.dumps(traits, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def root_key(namespace: Namespace, identity: Identity) -> ChunkKey:
    """The key before the first token: equal only if both arguments are equal."""
    digest = blake3(_field("lmcache.schema", struct.pack("<I", SCHEMA)))
    digest.update(_encode(namespace))
    digest.update(_encode(identity))
    return ChunkKey(digest.digest())


def next_key(
    previous: ChunkKey, tokens: Sequence[int], start: int, inserts: Iterable[Insert] = ()
) -> ChunkKey:
    """The key of the chunk that holds `tokens`, the first of which is at position `start`.

    `inserts` may name any stretches of the request; those that touch the chunk count. Raises
    `OverflowError` or `TypeError` for what is no token id of 32 bits. Fastest with an `array("I")`.
    """
    body = tokens if type(tokens) is array and tokens.typecode == "I" else array("I", tokens)
    if sys.byteorder == "big":
        body = body[:]
        body.byteswap()
    shown = _shown(inserts, start, start + len(body)) if inserts else b""
    data = b"".join((previous, _COUNT.pack(len(body)), body.tobytes(), shown))
    return ChunkKey(blake3(data).digest())


def _shown(inserts: Iterable[Insert], start: int, stop: int) -> bytes:
    """What of `inserts` touches positions `start` .. `stop`, relative to `start`."""
    return b"".join(
        _encode(Insert(i.identifier, i.offset - start, i.length))
        for i in sorted(inserts, key=lambda i: (i.offset, i.length, i.identifier))
        if i.offset < stop and i.offset + i.length > start
    )
