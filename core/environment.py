"""The environment variables that are not configuration keys."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

PREFIX = "LMCACHE_"
"""What every environment variable of ours begins with."""

VARIABLES = {
    "LMCACHE_CONFIG_FILE": "Path of the YAML file that holds the configuration.",
    "LMCACHE_COPY_PATH": "How bytes go between a GPU and the cache, in the process that copies:"
    " `direct` (the copy engine alone), `staged` (through a buffer) or `kernel` (over the bus)."
    " What is not pinned is staged all the same. By default whatever was the fastest when it was"
    " measured, once for each device; `~/.cache/lmcache/copy-paths.json` has the figures.",
    "LMCACHE_DISABLED_PLUGINS": "Names of plugins not to load, separated by commas.",
    "LMCACHE_FORCE_SKIP_SAVE": "A flag: store nothing, only load.",
    "LMCACHE_LOG_LEVEL": "Level of the `lmcache` logger, e.g. `DEBUG`.",
    "LMCACHE_MP_TRANSFER_MODE": "Who copies between an engine and a server: `auto`,"
    " `engine_driven` or `lmcache_driven`; an engine's own option wins.",
    "LMCACHE_MQ_TIMEOUT": "Seconds after which TensorRT-LLM gives up a call to the server.",
    "LMCACHE_REDIS_PASSWORD": "The password for Redis and Valkey, where the URL has none.",
    "LMCACHE_SERVER_URL": "Where TensorRT-LLM finds the server, unless its `server_url` says.",
    "LMCACHE_TOKEN": "What an engine, or a person, must show a server that was started with it.",
    "LMCACHE_TRACE_PLUGINS": "A flag: print every call of a plugin's hook to stderr.",
}
"""Variables that mean something here without being configuration keys."""

ENGINE_VARIABLES = {"LMCACHE_USE_UPSTREAM_MP"}
"""Variables that begin like ours and are an engine's."""


TEST_PREFIX = "LMCACHE_TEST_"
"""What variables of this project's own tests begin with."""


def is_service_link(name: str, env: Mapping[str, str]) -> bool:
    """Whether Kubernetes put `name` into `env`, as it does for every service of the namespace.

    A service `lmcache-server` appears as `LMCACHE_SERVER_SERVICE_HOST`, `LMCACHE_SERVER_PORT`, ...
    """
    services = (n[: -len("_SERVICE_HOST")] for n in env if n.endswith("_SERVICE_HOST"))
    return any(
        name.startswith((f"{service}_SERVICE_", f"{service}_PORT_"))
        or (name == f"{service}_PORT" and "://" in env[name])
        for service in services
    )


def environment_text(name: str, default: str = "", env: Mapping[str, str] = os.environ) -> str:
    """The variable's text; unset or empty means `default`."""
    return env.get(name, "").strip() or default


def environment_flag(name: str, env: Mapping[str, str] = os.environ) -> bool:
    """Whether the variable is switched on; unset or empty means off."""
    value = env.get(name, "").strip().lower()
    if value in ("1", "true", "t", "yes", "y", "on"):
        return True
    if value in ("", "0", "false", "f", "no", "n", "off"):
        return False
    raise ConfigError(f"environment variable {name} is {env[name]!r}, expected true or false")


def adopt_environment(prefixes: Sequence[str], env: MutableMapping[str, str] = os.environ) -> None:
    """Have `<prefix>LMCACHE_X` mean `LMCACHE_X`, where that is not set, for this process."""
    for name, value in list(env.items()):
        for prefix in prefixes:
            if name.startswith(prefix + PREFIX):
                env.setdefault(name.removeprefix(prefix), value)
