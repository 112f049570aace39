"""A request on one rank, what an executor is started with, and what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from fake_model import digests_of, next_token
from standin_request import LlmRequestState, NativeRequest, PythonRequest


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a test may choose."""

    ranks: int = 1
    layers: int = 2
    blocks: int = 64
    bs: int = 32
    kv: int = 2
    dtype: torch.dtype = torch.float32
    max_num_tokens: int = 8192
    chunked: bool = False
    overlap: bool = False
    reuse: bool = True
    partial: bool = False
    graphs: bool = False
    """Passes are replayed: no layer hook is called."""
    split: bool = False
    """A region for K and one for V of each layer; version 2 only."""
    described: bool = False
    """The pool is handed over as a layout, whatever the version of the cache manager."""
    windows: tuple[int | None, ...] = (None,)
    """The window of each group of layers; more than one with version 2 only."""
    saves_later: bool = False
    """No save may wait for the pass that it is of."""
    waits_for_nothing: bool = False
    """Who was offered something outside the batch waits for it, though none of it was wanted."""
    tells_of_less: bool = True
    """Connectors are told when less is used than they offered."""
    limit_s: float = 5.0
    """How long a call may take."""
    patience_s: float = 10.0
    """How long ranks wait for each other."""

    def layers_of(self, group):
        """The layers of a group, every so-and-so-many-th."""
        return list(range(group, self.layers, len(self.windows)))


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a client asks for."""

    id: int
    prompt: tuple[int, ...]
    new_tokens: int = 1
    salt: str | int | None = None
    lora: int | None = None
    media: tuple = ()
    priority: int | None = None
    defer: int = 0
    """Iterations between the query and the pass; version 2 only."""
    use: int | None = None
    """How much of an offer is taken; version 2 only."""

    @property
    def identity(self):
        return (self.salt, self.lora, self.media)


@dataclass(eq=False)
class Request:
    """A wish that an executor works on."""

    wish: Wish
    block_tokens: int
    tokens: list[int]
    """As far as the host knows them."""
    ahead: list[int]
    """As far as the device does."""
    tables: list[list[int]]
    state: LlmRequestState = LlmRequestState.CONTEXT_INIT
    position: int = 0
    matched: int = 0
    found: int = 0
    later: bool = False
    held: list[int] = field(default_factory=list)
    extra: tuple = (None, 0)
    """A block that starts as this one goes on, and for how many tokens."""
    is_admitted: bool = False
    is_asked: bool = False
    is_allocated: bool = False
    is_loaded: bool = False
    reported_tokens: int = 0
    reported_blocks: int = 0
    is_reported: bool = False
    is_cancelled: bool = False
    is_finished: bool = False
    is_gone: bool = False
    error: str | None = None
    waits: int = 0

    @classmethod
    def of(cls, wish, options):
        prompt = list(wish.prompt)
        tables = [[] for _ in options.windows]
        return cls(wish, options.bs, prompt, list(prompt), tables, waits=wish.defer)

    def __getattr__(self, name):
        if name == "wish":
            raise AttributeError(name)
        return getattr(self.wish, name)

    @property
    def is_loading(self):
        return self.state is LlmRequestState.DISAGG_GENERATION_TRANS_IN_PROGRESS

    @property
    def is_parked(self):
        """It runs once its load is over."""
        return self.later and not self.is_loaded

    @property
    def is_context(self):
        return self.position < len(self.prompt)

    @property
    def is_active(self):
        return not (self.is_finished or self.is_gone or self.is_loading)

    @property
    def blocks_needed(self):
        return -(-(len(self.prompt) + self.new_tokens + 1) // self.block_tokens)

    def native(self, salt):
        return NativeRequest(self, salt)

    def python(self, salt):
        return PythonRequest(self, salt)

    def digests(self):
        return digests_of(self.ahead, self.salt, self.lora, self.media)

    def say(self, digests):
        """The next token, which the host does not know yet."""
        self.ahead.append(next_token(digests))

    def listen(self):
        """The host reads one token."""
        self.tokens.append(self.ahead[len(self.tokens)])
        self.is_finished = len(self.tokens) - len(self.prompt) >= self.new_tokens

    def restart(self):
        """As if it had just come; what is said is part of what is to be computed."""
        fresh = Request(self.wish, self.block_tokens, self.tokens, self.ahead, [])
        fresh.tables = [[] for _ in self.tables]
        vars(self).update(vars(fresh))


@dataclass(eq=False)
class Pass:
    """What one forward computes of a request."""

    request: Request
    count: int
    first: bool
    is_context: bool
    loaded: list[list[int]] = field(default_factory=list)
    """The blocks that a load was promised for."""
    start: int = 0
    tables: list = field(default_factory=list)
    digests: np.ndarray | None = None
    speaks: bool = False


class Trace:
    """The calls of one rank, in order."""

    def __init__(self):
        self.calls = []

    def add(self, *call):
        self.calls.append(call)

    def of(self, *names):
        return [call for call in self.calls if call[0] in names]

    def without(self, *names):
        return [call for call in self.calls if call[0] not in names]

    def count(self, name):
        return len(self.of(name))

    def clear(self):
        self.calls.clear()
