"""What engines and the server say to each other; `docs/protocol.md` specifies it.

Each message is one piece of MessagePack that decodes into one of the types below or is refused.
Every field has a bound: a peer can be wrong, but it cannot make us allocate what it likes.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from msgspec import Meta

from lmcache.core.errors import ServiceError
from lmcache.core.index import Slot
from lmcache.core.objects import MAX_SLICES
from lmcache.core.receipts import Reason, Receipt

if TYPE_CHECKING:
    from lmcache.core.decider import Hit

PROTOCOL = 2
MODES = ("auto", "engine_driven", "lmcache_driven")
"""What an engine may ask for; `auto` is the first of the others."""
MAX_MESSAGE = 32 << 20
"""Bytes: the tokens of a prompt of eight million."""
MAX_TOKENS = MAX_MESSAGE // 4 - 1024
MAX_SLOTS = 1 << 18
"""Of one answer, which would not be a message with twice as many."""
MAX_TEXT = 4096
_MAX_CHUNKS = 1 << 20

Word = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, Meta(max_length=512)]
Long = Annotated[str, Meta(max_length=MAX_TEXT)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Words = Annotated[list[Word], Meta(max_length=_MAX_CHUNKS)]
Slots = Annotated[list[Slot], Meta(max_length=MAX_SLOTS)]
Count = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Duration = Annotated[float, Meta(ge=0)]
Position = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class Shown(msgspec.Struct, frozen=True):
    """A stretch of placeholder tokens and what it stands for; see `Insert`."""

    identifier: Long
    offset: Annotated[int, Meta(ge=-MAX_TOKENS, le=MAX_TOKENS)]
    length: Position


class Like(msgspec.Struct, frozen=True):
    """The first tokens of a sequence that the server knows."""

    sequence: Word
    tokens: Position
    """How many."""


class More(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a sequence that the server has not been told yet."""

    root: Key
    shown: Annotated[list[Shown], Meta(max_length=4096)] = []
    at: Position = 0
    """How many it must know already; 0 begins the sequence anew."""
    like: Like | None = None
    """What a sequence that begins anew begins with, before `tokens`."""
    tokens: Annotated[memoryview, Meta(max_length=4 * MAX_TOKENS)]
    """Token ids, 32 bits each, little-endian. Not copied."""


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What tells an engine's keys from another's, but for the layout; see `Namespace`."""

    model: Long = ""
    generation: Long = ""
    dtype: Name = ""
    parallel: Name = ""


# --- from the engine


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An engine wants to share the cache. The server visits the doors of its movers."""

    protocol: int = PROTOCOL
    release: Name
    """The client's version, for messages."""
    engine: Name
    """The id the doors' addresses follow from."""
    name: Name
    """What people call it."""
    movers: Annotated[int, Meta(ge=1, le=1024)]
    chunk_size: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    """What the engine was told to use; None if the server's will do."""
    mode: Name = "auto"
    """The transfer mode it was told to use."""
    deployment: Deployment = Deployment()
    """For people who ask about a prompt; the roots of the engine's sequences say it all."""
    token: Long = ""


class Detach(msgspec.Struct, frozen=True, tag=True):
    """The engine will not come back."""


class Lookup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Lease the longest stored stretch of tokens `start` .. `stop` of a sequence."""

    owner: Name
    sequence: Word
    more: More | None = None
    start: Position = 0
    """The first token of a chunk."""
    stop: Position
    in_windows: bool = False
    """Whether the owner loads what there is, and asks again for more."""
    priority: Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)] = 0
    """Among those who wait for slower tiers; lower is more urgent."""


class Promise(msgspec.Struct, frozen=True, tag=True):
    """The engine counts on a lease: no deadline ends it from now on. Not answered."""

    lease: Word


class Release(msgspec.Struct, frozen=True, tag=True):
    """The owner wants nothing more of what it looked up. Not answered."""

    owner: Name
    lease: Word | None = None


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Slots for what of tokens `start` .. `stop` is not stored."""

    sequence: Word
    more: More | None = None
    start: Position
    stop: Position
    tail: bool


class Depart(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step is sent to the movers: its slots and leases are theirs. Not answered."""

    number: Word
    stores: Words = []
    """Generations of reserved slots."""
    loads: Words = []
    """Numbers of leases."""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The step that was to hold these will not be sent. Not answered."""

    stores: Words = []
    loads: Words = []


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Nothing more will be asked of these sequences. Not answered."""

    sequences: Words


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks whether the server is there, and whether it knows the session."""


Request = Attach | Detach | Lookup | Promise | Release | Reserve | Depart | Cancel | Forget | Ping


# --- from the server


class Attached(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine shares the cache from now on."""

    session: Word
    """To be named in every further call; the movers' steps name it too."""
    page_tokens: Count
    pages_per_chunk: Count
    slices: Annotated[list[Count], Meta(min_length=1, max_length=MAX_SLICES)]
    layout: Key
    lease_s: Duration
    fetch_timeout_s: Duration
    capacity_bytes: Word
    has_tiers: bool
    """Whether slower tiers are asked for what memory lacks."""


class Found(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a lookup."""

    slots: Slots
    lease: Word | None
    tokens: Word
    asked: Word
    reason: Name
    by_tier: Annotated[dict[Name, Word], Meta(max_length=1024)]
    more: Word = 0
    """Tokens beyond these that a slower tier has and the slab has no room for."""
    size: Word
    milliseconds: Duration


class Fetching(msgspec.Struct, frozen=True, tag=True):
    """A slower tier is being read; `Found` follows under the same number."""


class Lacking(msgspec.Struct, frozen=True, tag=True):
    """All that the server knows of the sequence is stored, and the lookup is of more: tell it."""


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Reserve`."""

    slots: Slots
    reason: Name


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Ping`."""

    release: Name


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """The server has no such session or sequence: begin anew."""

    what: Name


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request cannot be honoured, now or, if `final`, ever."""

    why: Long
    final: bool = False


Reply = Attached | Found | Fetching | Lacking | Reserved | Pong | Unknown | Refused


class Call(msgspec.Struct, frozen=True, array_like=True):
    """What an engine sends."""

    number: Word
    """Comes back with the answer; 0 where there is none."""
    session: Word
    """0 before `Attached`."""
    body: Request


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What the server sends."""

    number: Word
    boot: Key
    """Another one at each start of the server."""
    body: Reply


Frame = TypeVar("Frame", Call, Answer)

_encoder = msgspec.msgpack.Encoder()
_CALL = msgspec.msgpack.Decoder(Call)
_ANSWER = msgspec.msgpack.Decoder(Answer)


def encode(frame: Call | Answer) -> bytes:
    """The bytes of a frame. Raises `ServiceError` for one that no peer would take."""
    data = _encoder.encode(frame)
    if len(data) > MAX_MESSAGE:
        raise ServiceError(f"a message of {len(data)} bytes is over {MAX_MESSAGE}")
    return data


def decode_call(data: bytes | memoryview) -> Call:
    """The frame in `data`. Raises `ServiceError` for anything else."""
    return _decode(data, _CALL)


def decode_answer(data: bytes | memoryview) -> Answer:
    """The frame in `data`. Raises `ServiceError` for anything else."""
    return _decode(data, _ANSWER)


def _decode(data: bytes | memoryview, decoder: msgspec.msgpack.Decoder[Frame]) -> Frame:
    if len(data) > MAX_MESSAGE:
        raise ServiceError(f"a message of {len(data)} bytes is over {MAX_MESSAGE}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError(f"not a message of protocol {PROTOCOL}: {error}") from error


class _Foreign(msgspec.Struct, tag="Attach"):
    """What every protocol has in common: how it says which one it is."""

    protocol: int


class _ForeignCall(msgspec.Struct, array_like=True):
    number: Word
    session: Word
    body: _Foreign


_FOREIGN = msgspec.msgpack.Decoder(_ForeignCall)


def foreign_protocol(data: bytes | memoryview) -> tuple[int, int] | None:
    """Call number and protocol of an `Attach` that is not ours; None for all else."""
    try:
        call = _FOREIGN.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return None if call.body.protocol == PROTOCOL else (call.number, call.body.protocol)


def found(hit: Hit) -> Found:
    """A lookup's result, as it travels."""
    receipt = hit.receipt
    return Found(
        slots=hit.slots,
        lease=hit.lease.number if hit.lease else None,
        tokens=receipt.tokens,
        asked=receipt.asked,
        reason=receipt.reason.name,
        by_tier=receipt.by_tier,
        more=hit.more,
        size=receipt.bytes,
        milliseconds=receipt.milliseconds,
    )


def receipt_of(answer: Found) -> Receipt:
    """A lookup's result, as it is here. Raises `ServiceError` for a reason nobody knows."""
    return Receipt(
        answer.tokens,
        answer.asked,
        reason_of(answer.reason),
        answer.by_tier,
        answer.size,
        answer.milliseconds,
    )


def reason_of(name: str) -> Reason:
    """The reason of that name. Raises `ServiceError` for one that nobody knows."""
    try:
        return Reason[name]
    except KeyError:
        raise ServiceError(f"the server gives a reason nobody knows: {name}") from None


def in_wire_order(data: memoryview) -> memoryview:
    """Bytes of tokens between this machine and the wire, where they are little-endian."""
    if sys.byteorder == "little":
        return data
    swapped = array("I", bytes(data))
    swapped.byteswap()
    return memoryview(swapped).cast("B")
