"""Tiers as LMCache/LMCache's `--l2-adapter` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

_IGNORED = {"num_workers"}


def url_of(text: str) -> str:
    """The URL of a tier given as JSON. Raises `ConfigError` for what we have no equal of."""
    try:
        about: dict[str, Any] = json.loads(text)
        kind = about.pop("type")
    except (ValueError, KeyError, TypeError, AttributeError):
        # not quoted: it may hold a password
        raise ConfigError("what --l2-adapter says is no JSON object with a type") from None
    if kind not in _KINDS:
        raise ConfigError(
            f"--l2-adapter of type {kind!r} is not known; known: {', '.join(_KINDS)}. "
            "For other backends use --l2 with a URL; `lmcache plugins` lists them"
        )
    write, ignored = _KINDS[kind]
    try:
        url = write(about)
    except KeyError as missing:
        raise ConfigError(f"--l2-adapter of type {kind!r} needs {missing}") from None
    if unknown := about.keys() - ignored - _IGNORED:
        raise ConfigError(f"--l2-adapter of type {kind!r} has unknown keys {sorted(unknown)}")
    return url


def _file(about: dict[str, Any]) -> str:
    path, size = about.pop("base_path"), about.pop("max_capacity_gb")
    return f"file://{quote(str(Path(path).absolute()))}?max_size={size}GB"


def _redis(about: dict[str, Any]) -> str:
    host, port = about.pop("host"), about.pop("port")
    user, password = (about.pop(name, "") or "" for name in ("username", "password"))
    secret = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
    host = f"[{host}]" if ":" in host else host
    return f"redis://{secret}{host}:{port}"


_KINDS: dict[str, tuple[Callable[[dict[str, Any]], str], set[str]]] = {
    "fs": (_file, {"use_odirect", "read_ahead_size", "relative_tmp_dir"}),
    "fs_native": (_file, {"use_odirect", "read_ahead_size", "relative_tmp_dir"}),
    # the server's own `maxmemory` says how much there is room for
    "resp": (_redis, {"max_capacity_gb"}),
}
"""How each type is written as a URL, and which of its keys say how and not what."""
