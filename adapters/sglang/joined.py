"""One rank: its pools, and the cache that they are joined to."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import lmcache
from lmcache.adapters.sglang.scheduler import Scheduler
from lmcache.adapters.sglang.translate import namespace_of
from lmcache.adapters.sglang.worker import Worker
from lmcache.core.exchange import check_alone
from lmcache.core.joining import Joining
from lmcache.core.service.attaching import Place, join_server

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from lmcache.adapters.sglang.scheduler import Found
    from lmcache.adapters.sglang.settings import Settings
    from lmcache.adapters.sglang.worker import Loading
    from lmcache.core.keys import Namespace

Pools = tuple["Sequence[torch.Tensor]", "Sequence[torch.Tensor]"]
"""Keys and values, a tensor for each layer."""


class Joined:
    """Joined to a server, or to what `attach` makes for an engine of a given id."""

    def __init__(
        self,
        sgl_config: Any,
        settings: Settings,
        pools: Pools,
        *,
        parallel: str,
        ranks: int,
        attach: Callable[[str], Any] | None = None,
    ) -> None:
        """`parallel` tells this rank's share of the bytes from the others', of whom are `ranks`.

        Raises `LMCacheError` for what cannot be cached, or cannot be configured so.
        """
        engine_id = f"sglang-{uuid.uuid4().hex}"
        lends = attach is None and settings.mp_transfer_mode == "lmcache_driven"
        config = settings.config
        if config.exchange:
            check_alone(ranks)
        self.worker = Worker(
            engine_id,
            *pools,
            lends=lends,
            deadline_s=settings.mq_timeout,
            exchanged=bool(config.exchange),
        )
        namespace = namespace_of(sgl_config, config, self.worker.pools, parallel)
        self.joining: Joining[Any]
        with ExitStack() as undo:
            undo.callback(self.worker.close)
            if attach:
                self.joining = Joining(lambda: attach(engine_id))
            else:
                self.joining = _joined_to_server(engine_id, settings, namespace)
            undo.pop_all()
        self.scheduler = Scheduler(
            namespace, self.joining, config.chunk_size, config.fetch_timeout_ms / 1e3
        )

    def begin(self, found: Found, slots: Sequence[int], absent: int) -> Loading | None:
        """A load of the tokens after the first `absent`; None if it cannot be made."""
        copies = self.scheduler.load(found, slots, absent)
        return self.worker.loading(copies) if copies else None

    def load(self, found: Found, slots: Sequence[int], absent: int, *, after: Any = None) -> bool:
        """Load the tokens after the first `absent`, once the stream `after` is done with them.

        Whether they are what was promised; if not, nothing is written any more.
        """
        loading = self.begin(found, slots, absent)
        if loading is None:
            return False
        try:
            self.worker.follow(after)
            return loading.whole()
        finally:
            loading.end()

    def store(
        self, token_ids: Sequence[int], slots: Sequence[int], start: int = 0, salt: str = ""
    ) -> bool:
        """Store what is not stored yet of tokens from `start` on, whose `slots` these are."""
        table = [-1] * start + list(slots)
        copies = self.scheduler.store(token_ids, table, start, salt)
        return self.worker.store(copies) if copies else True

    def close(self) -> None:
        """Let go of everything; again does nothing."""
        self.scheduler.close()
        self.worker.close()


def _joined_to_server(engine_id: str, settings: Settings, namespace: Namespace) -> Joining[Any]:
    config = settings.config
    place = Place(
        endpoint=settings.endpoint,
        mode=settings.mp_transfer_mode,
        deadline_s=settings.mq_timeout,
        watch_s=settings.heartbeat_interval,
    )
    return join_server(
        place,
        namespace,
        release=lmcache.__version__,
        engine_id=engine_id,
        name=f"{config.lmcache_instance_id or engine_id} {namespace.parallel}",
        movers=1,
        chunk_size=config.chunk_size if settings.has_chunk_size else None,
    )
