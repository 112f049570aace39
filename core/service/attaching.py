"""How an engine becomes a server's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lmcache.core.environment import environment_text
from lmcache.core.joining import Joining
from lmcache.core.log import init_logger
from lmcache.core.service import wire
from lmcache.core.service.client import ServiceClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.keys import Namespace

logger = init_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A server, and how it is spoken to."""

    endpoint: str
    mode: str
    """Who copies, as in `wire.MODES`."""
    deadline_s: float
    """After which a call is given up."""
    watch_s: float
    """Between two looks at whether it is there."""
    patience_s: float | None = None
    """How long a lookup may hold up the schedule; None for as long as a client does by default."""


def join_server(
    place: Place,
    namespace: Namespace,
    *,
    release: str,
    engine_id: str,
    name: str,
    movers: int,
    chunk_size: int | None,
    before: Callable[[], None] | None = None,
) -> Joining[ServiceClient]:
    """Keep an engine attached to a server for as long as both live.

    `before` is called before each attempt, e.g. to start a server. `chunk_size` is what the user
    wants, if anything. Raises `ConfigError` for what the server will never have.
    """
    said = asdict(namespace)
    about = wire.Attach(
        release=release,
        engine=engine_id,
        name=name,
        movers=movers,
        chunk_size=chunk_size,
        mode=place.mode,
        deployment=wire.Deployment(**{key: said[key] for key in wire.Deployment.__struct_fields__}),
        token=environment_text("LMCACHE_TOKEN"),
    )

    def attach() -> ServiceClient:
        if before:
            before()
        client = ServiceClient.open(
            place.endpoint, about, place.deadline_s, patience_s=place.patience_s
        )
        logger.info("Attached to %s: %s", place.endpoint, client.geometry)
        return client

    return Joining(attach, f"the server at {place.endpoint} is gone", place.watch_s)
