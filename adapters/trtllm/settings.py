"""What a user of TensorRT-LLM can choose: there is nothing but the environment, and an address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache.core.config import load_config
from lmcache.core.environment import adopt_environment, environment_text
from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from lmcache.core.config import LoadedConfig

PASSED_ON = ("TLLM_", "TRTLLM_")
"""Beginnings of the variables that TensorRT-LLM passes on to the processes it starts."""
DEFAULT_SERVER = "tcp://localhost:5555"
SCHEMES = ("tcp://", "ipc://")
DEADLINE_S = 1.0
WATCH_S = 0.5


@dataclass(frozen=True)
class Settings:
    """For one engine."""

    loaded: LoadedConfig
    endpoint: str
    """The server's address, for who has one."""
    deadline_s: float
    """After which a call to the server is given up, and the prompt computed instead."""


def load_settings(llm_args: Any) -> Settings:
    """From the environment, and the arguments of an engine.

    Raises `ConfigError` for what is not understood.
    """
    adopt_environment(PASSED_ON)
    connector = getattr(llm_args, "kv_connector_config", None)
    said = getattr(connector, "server_url", None)  # 1.2 has no such field
    deadline = environment_text("LMCACHE_MQ_TIMEOUT", str(DEADLINE_S))
    return Settings(
        load_config(),
        _endpoint(said or environment_text("LMCACHE_SERVER_URL", DEFAULT_SERVER)),
        _seconds("LMCACHE_MQ_TIMEOUT", deadline),
    )


def _endpoint(address: str) -> str:
    if "://" not in address:
        return f"tcp://{address}"
    if not address.startswith(SCHEMES):
        raise ConfigError(f"the server's address is {address!r}, expected {' or '.join(SCHEMES)}")
    return address


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"environment variable {name} is {text!r}, expected seconds")
    return seconds
