"""The `lmcache.mp.*` keys of vLLM's `kv_connector_extra_config`."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmcache.core.config_types import Flag, Port, PositiveAmount, Text
from lmcache.core.environment import environment_text
from lmcache.core.errors import ConfigError
from lmcache.core.service.wire import MODES

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "lmcache.mp."

REFUSED = {
    "isolated_ipc": "memory is handed over by descriptor or by CUDA's handles; nothing to choose",
    "use_vmm_api": "a GPU's memory is lent by CUDA's handles, which virtual memory has not",
    "lazy_offload": "chunks are stored as soon as they are computed",
    "transfer_intermediate_tensors": "only KV pages are cached",
}
"""Keys of LMCache/LMCache that ask for what is not done here, and why."""


class MpOptions(BaseModel):
    """How an engine uses a server."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: Text = "tcp://127.0.0.1"
    port: Port = 5555
    server_urls: Any = None
    mq_timeout: PositiveAmount = 1.0
    """Seconds after which a call to the server is given up, and the prompt computed instead."""
    heartbeat_interval: PositiveAmount = 0.5
    """Seconds between two looks at whether the server is there."""
    mp_transfer_mode: Text = Field(
        default_factory=lambda: environment_text("LMCACHE_MP_TRANSFER_MODE", "auto")
    )
    hash_algorithm: Text = "blake3"
    nonblocking_lookup_status: Flag = True
    """Whether the batch goes on while the server looks a prompt up."""
    eager_prefetch: Flag = False
    """Look a prompt up when it arrives, not when it is its turn."""
    save_decode_cache: Flag | None = None
    autostart: Flag = False
    """Start a server on this machine if there is none."""
    autostart_server_args: Any = ()
    autostart_wait_timeout: PositiveAmount = 90.0

    @property
    def endpoint(self) -> str:
        """The server's address."""
        urls = self.server_urls
        if isinstance(urls, str):
            urls = [url.strip() for url in urls.split(",") if url.strip()]
        if urls:
            if len(urls) > 1:
                raise ConfigError(f"{PREFIX}server_urls names {len(urls)} servers; one can be used")
            return _with_scheme(str(urls[0]))
        return f"{_with_scheme(self.host)}:{self.port}"


def _with_scheme(address: str) -> str:
    return address if "://" in address else f"tcp://{address}"


def split_options(extra: Mapping[str, Any]) -> tuple[MpOptions, dict[str, Any]]:
    """The options of the server's use, and all other keys.

    Raises `ConfigError` for a key that is unknown, refused, or has a value that cannot be used.
    """
    rest = {key: value for key, value in extra.items() if not key.startswith(PREFIX)}
    chosen: dict[str, Any] = {}
    for key, value in extra.items():
        if not key.startswith(PREFIX):
            continue
        name = key.removeprefix(PREFIX)
        if name in REFUSED:
            if value not in (False, None, "false", "False", 0):
                raise ConfigError(f"{key} cannot be had: {REFUSED[name]}")
            continue
        field = name.replace("autostart.", "autostart_")
        if field not in MpOptions.model_fields:
            known = [PREFIX + field for field in (*MpOptions.model_fields, *REFUSED)]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown configuration key {key!r}, the nearest is {nearest!r}")
        chosen[field] = value
    try:
        options = MpOptions.model_validate(chosen)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        name = PREFIX + str(found["loc"][0])
        raise ConfigError(f"{name} is {found['input']!r}: {found['msg']}") from None
    _check(options)
    return options, rest


def _check(options: MpOptions) -> None:
    if options.mp_transfer_mode not in MODES:
        raise ConfigError(
            f"{PREFIX}mp_transfer_mode is {options.mp_transfer_mode!r}, expected {', '.join(MODES)}"
        )
    if options.hash_algorithm != "blake3":
        raise ConfigError(f"{PREFIX}hash_algorithm is {options.hash_algorithm!r}, keys are blake3")
    assert options.endpoint
