"""What happened to one request, and why it did not go better."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Reason(Enum):
    """Why a lookup stopped where it did, or a store kept less than it was given."""

    NONE = "everything asked for was done"
    SHORT = "the prompt is shorter than one engine page"
    NEVER_STORED = "no chunk was ever stored under this key"
    EVICTED = "the chunk was stored and has been evicted"
    BEING_WRITTEN = "the chunk is being written"
    TIMED_OUT = "a slower tier did not answer in time"
    TIER_FAILED = "a slower tier failed, or is left alone after it did"
    DAMAGED = "a slower tier returned bytes that fail their check"
    NO_ROOM = "the slab is full of chunks in use"
    BELOW_MINIMUM = "the hit is shorter than min_retrieve_tokens"
    UNKEYABLE = "the request shows the model something that has no key"
    POLICY = "the configuration or the request forbids it"
    DEGRADED = "the cache is not attached to the engine"
    LOAD_FAILED = "the copy into the engine failed"


@dataclass(frozen=True)
class Receipt:
    """One lookup, store or retrieve."""

    tokens: int
    """Tokens that hit, were stored or were loaded."""
    asked: int
    """Tokens that were asked for."""
    reason: Reason
    """Why `tokens` is not `asked`: the reason of the first chunk that was not done."""
    by_tier: dict[str, int] = field(default_factory=dict)
    """Tokens by the tier they came from or went to; `l1` is the slab."""
    bytes: int = 0
    milliseconds: float = 0.0
