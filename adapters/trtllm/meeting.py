"""How the parts of an engine find each other, and those that are alive in this process."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lmcache.adapters.trtllm.asking import Asker

_LOCK = threading.Lock()
_WAITING: dict[int, tuple[Any, str, str]] = {}
"""Engines of which one part has been made, by the arguments that it was given."""


class Closable(Protocol):
    """A part of an engine."""

    def shutdown(self) -> None:
        """Let go of everything."""


LIVE: set[Closable] = set()
"""The parts in this process. Nothing but `shutdown` ends what they began."""
ASKERS: dict[str, Asker] = {}
"""By the names of engines whose leader is in this process, and that have pools."""


def engine_id_for(llm_args: Any, part: str) -> str:
    """The name of an engine, for its scheduler and the worker beside it, which are made at once.

    TensorRT-LLM has no name for an engine, but gives both the same arguments.
    """
    with _LOCK:
        _, engine_id, other = _WAITING.pop(id(llm_args), (None, "", part))
        if other == part:  # or the other never came, and it begins anew
            engine_id = f"trtllm-{uuid.uuid4().hex}"
            _WAITING[id(llm_args)] = llm_args, engine_id, part
        return engine_id


def destroy_engine() -> None:
    """Close every connector in this process, if there is one; again does nothing.

    TensorRT-LLM usually runs its engine in processes of its own: those end by themselves.
    """
    for part in list(LIVE):
        part.shutdown()
