"""The connectors alive in this process, for scripts that tear an engine down by hand."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

ENGINE_NAME = "vllm-instance"
"""What scripts call the engine of their process."""


class Closable(Protocol):
    """Something with a `shutdown`."""

    def shutdown(self) -> None:
        """Let go of everything."""


LIVE: WeakSet[Closable] = WeakSet()


class LMCacheEngineBuilder:
    """The one operation that scripts written for LMCache use."""

    @classmethod
    def destroy(cls, instance_id: str) -> None:
        """Shut down every connector of this process; those of other processes end with them.

        vLLM usually runs its engine in a process of its own: then there is nothing to do here.
        Raises `ValueError` for a name that is not `ENGINE_NAME`.
        """
        if instance_id != ENGINE_NAME:
            raise ValueError(f"no engine {instance_id!r}; the engine here is {ENGINE_NAME!r}")
        for connector in list(LIVE):
            connector.shutdown()
