"""The configuration file that SGLang names, and the keys in it that only mean something here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache.core.config import load_config
from lmcache.core.environment import environment_text
from lmcache.core.errors import ConfigError
from lmcache.core.service.wire import MODES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lmcache.core.config import Config

_KEYS = ("mp_host", "mp_port", "extra_config")
_EXTRA = "lmcache.mp."


@dataclass(frozen=True)
class Settings:
    """What a user of SGLang can choose. SGLang reads `mp_host` and `mp_port`."""

    config: Config
    has_chunk_size: bool
    """Whether the chunk size was chosen."""
    mp_host: str = "127.0.0.1"
    mp_port: int = 5555
    mp_transfer_mode: str = "auto"
    mq_timeout: float = 1.0
    """Seconds after which a call to the server is given up, and the prompt computed instead."""
    heartbeat_interval: float = 0.5
    """Seconds between two looks at whether the server is there."""

    @property
    def endpoint(self) -> str:
        """The server's address."""
        host = self.mp_host if "://" in self.mp_host else f"tcp://{self.mp_host}"
        return f"{host}:{self.mp_port}"


def load_settings(path: str | None) -> Settings:
    """From the file at `path`, or the one that `LMCACHE_CONFIG_FILE` names, and the environment.

    Raises `ConfigError` for what is not understood.
    """
    loaded = load_config(file=path or None, others=_KEYS)
    chosen = {key: value for key, value in loaded.others.items() if value is not None}
    extra = chosen.pop("extra_config", {})
    if not isinstance(extra, dict):
        raise ConfigError(f"extra_config is {extra!r}, expected a mapping")
    chosen |= {
        key.removeprefix(_EXTRA): value for key, value in extra.items() if key.startswith(_EXTRA)
    }
    mode = environment_text("LMCACHE_MP_TRANSFER_MODE", "auto")
    return Settings(
        loaded.config,
        loaded.sources["chunk_size"] != "default",
        **_checked({"mp_transfer_mode": mode, **chosen}),
    )


def _checked(chosen: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"mp_host": str, "mp_port": int, "mp_transfer_mode": str}
    kinds |= {"mq_timeout": float, "heartbeat_interval": float}
    checked = {}
    for key, value in chosen.items():
        if key not in kinds:
            raise ConfigError(f"unknown key {_EXTRA}{key}; known: {', '.join(sorted(kinds))}")
        try:
            checked[key] = kinds[key](value)
        except (TypeError, ValueError):
            raise ConfigError(f"{key} is {value!r}, expected {kinds[key].__name__}") from None
    if checked["mp_transfer_mode"] not in MODES:
        raise ConfigError(
            f"mp_transfer_mode is {checked['mp_transfer_mode']!r}, expected {', '.join(MODES)}"
        )
    return checked
