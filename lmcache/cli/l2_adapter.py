"""Tiers as LMCache/LMCache's `--l2-adapter` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

_IGNORED = {"num_workers", "per_op_workers"}


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
    secret = _secret(about, "username", "password")
    host = f"[{host}]" if ":" in host else host
    return f"redis://{secret}{host}:{port}"


def _s3(about: dict[str, Any]) -> str:
    """Their endpoint is that of the bucket, which is the first word of its host."""
    bucket, _, host = about.pop("s3_endpoint").removeprefix("s3://").partition(".")
    if about.pop("s3_enable_s3express", False):
        raise ConfigError("--l2-adapter of type 's3': S3 Express is not supported")
    scheme = "http" if about.pop("disable_tls", False) else "https"
    options = {"region": about.pop("s3_region"), "endpoint": f"{scheme}://{host}"}
    secret = _secret(about, "aws_access_key_id", "aws_secret_access_key")
    return f"s3://{secret}{bucket}?{urlencode(options)}&virtual_hosted=true"


def _mooncake(about: dict[str, Any]) -> str:
    """What they hand on to Mooncake."""
    master = about.pop("master_server_addr")
    said = {ours: about.pop(theirs, None) for theirs, ours in _OF_MOONCAKE.items()}
    if str(said["segment"]) == "0":
        said["segment"] = None
    options = urlencode({name: value for name, value in said.items() if value})
    return f"mooncake://{master}" + (f"?{options}" if options else "")


def _secret(about: dict[str, Any], *names: str) -> str:
    user, password = (quote(about.pop(name, "") or "", safe="") for name in names)
    return f"{user}:{password}@" if user or password else ""


_OF_MOONCAKE = {
    "metadata_server": "metadata",
    "global_segment_size": "segment",
    "local_buffer_size": "buffer",
    "protocol": "protocol",
    "rdma_devices": "device",
}
_KINDS: dict[str, tuple[Callable[[dict[str, Any]], str], set[str]]] = {
    "fs": (_file, {"use_odirect", "read_ahead_size", "relative_tmp_dir"}),
    "fs_native": (_file, {"use_odirect", "read_ahead_size", "relative_tmp_dir"}),
    # the server's own `maxmemory` says how much there is room for
    "resp": (_redis, {"max_capacity_gb"}),
    # as do the rules of a bucket
    "s3": (_s3, {"max_capacity_gb", "s3_num_io_threads", "s3_prefer_http2"}),
    # our address is that at which we reach the master
    "mooncake_store": (_mooncake, {"local_hostname"}),
}
"""How each type is written as a URL, and which of its keys say how and not what."""
