"""A cache in the process where an engine schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lmcache.core.assembly import GIB, Offers, assemble
from lmcache.core.attachment import Attachment
from lmcache.core.log import init_logger
from lmcache.core.metrics import Exporter

if TYPE_CHECKING:
    from lmcache.core.config import Config

logger = init_logger(__name__)

VISIT_S = 5.0
"""How long a mover may take to answer."""


class Plugins(Offers, Protocol):
    """What users may choose from, and who wants to know of engines; the plugin manager is one."""

    def engine_started(self, engine_id: str) -> None:
        """An engine has a cache."""

    def engine_stopped(self, engine_id: str) -> None:
        """It has none any more."""


def embed(engine_id: str, movers: int, config: Config, plugins: Plugins) -> Attachment:
    """Make the cache of an engine, whose movers must be listening.

    Raises `HandoverError` if one of them is not, and whatever fails to be made raises its own.
    """
    attachment = Attachment.open(
        engine_id, movers, config.chunk_size, lambda _: assemble(config, plugins), VISIT_S
    )
    try:
        _export(attachment, config.lmcache_instance_id or engine_id, config.metrics_port)
        plugins.engine_started(engine_id)
        attachment.on_close.append(lambda: plugins.engine_stopped(engine_id))
    except BaseException:
        attachment.close()
        raise
    geometry = attachment.geometry
    logger.info("Attached: %.2f GiB for %s", attachment.decider.slab.size / GIB, geometry)
    if geometry.chunk_tokens != config.chunk_size:
        logger.warning(
            "chunk_size %d is not whole engine pages of %d tokens: using %d",
            config.chunk_size,
            geometry.page_tokens,
            geometry.chunk_tokens,
        )
    return attachment


def _export(attachment: Attachment, name: str, port: int) -> None:
    try:
        exporter = Exporter(name, attachment.decider, port)
    except OSError as error:
        logger.warning("no metrics on port %d: %s", port, error)
    else:
        attachment.on_close.append(exporter.close)
