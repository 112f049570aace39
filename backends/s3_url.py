"""What the URL of a bucket says, and what the environment has to add."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lmcache.backends.bucket import Bucket
from lmcache.core.environment import environment_text
from lmcache.core.errors import ConfigError
from lmcache.core.urls import parse_url

if TYPE_CHECKING:
    from lmcache.core.urls import Url

OPTIONS = ("concurrency", "endpoint", "part_size", "region", "timeout", "virtual_hosted")
TIMEOUT_S = 5
PART_SIZE = 8 << 20
SMALLEST_PART, LARGEST_PART = 5 << 20, 5 << 30
"""What S3 takes."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_LONGEST_PREFIX = 900
"""Of 1,024 bytes that a name may have."""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
"""Any of them is enough for obstore not to ask the machine that it runs on."""
_AMAZON = re.compile(r"(?:.*\.)?amazonaws\.com(?:\.cn)?")


def bucket_of(url: Url) -> Bucket:
    """The bucket, which nobody has asked for anything yet."""
    if not _BUCKET.fullmatch(url.host) or url.port is not None:
        raise ConfigError("write s3://bucket/prefix, and ?endpoint=https://host:port if need be")
    endpoint, credentials = _endpoint(url), _credentials(url)
    if endpoint and not credentials:
        _expect_credentials(endpoint)
    settings: dict[str, Any] = {}
    if region := url.options.get("region"):
        settings["region"] = region
    if url.flag("virtual_hosted"):
        settings["virtual_hosted_style_request"] = True
        endpoint = endpoint and endpoint.replace("://", f"://{url.host}.", 1)
    return Bucket(
        url.host,
        timeout_s=url.count("timeout") or TIMEOUT_S,
        endpoint=endpoint,
        credentials=credentials,
        **settings,
    )


def prefix_of(url: Url) -> str:
    """What the names of all objects begin with, up to a slash; or nothing."""
    prefix = url.path.strip("/")
    odd = prefix and {"", ".", ".."} & set(prefix.split("/"))
    # what is no UTF-8 is not printable either
    if odd or not prefix.isprintable() or len(prefix.encode()) > _LONGEST_PREFIX:
        raise ConfigError(
            f"{prefix!r} is no prefix; write words with single slashes between them, "
            f"{_LONGEST_PREFIX} bytes at most"
        )
    return prefix


def part_size_of(url: Url) -> int:
    """The bytes that are sent, or asked for, in one request."""
    size = url.size("part_size")
    if size is None:
        return PART_SIZE
    if not SMALLEST_PART <= size <= LARGEST_PART:
        raise ConfigError("option 'part_size': S3 takes parts of 5MiB to 5GiB")
    return size


def _endpoint(url: Url) -> str | None:
    texts = (url.options.get("endpoint"), *map(environment_text, _ENDPOINTS))
    text = next(filter(None, texts), None)
    if text is None:
        return None
    parsed = parse_url(text)
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.username:
        raise ConfigError("the endpoint of a store of objects is https://host:port, or http://")
    return text.rstrip("/")


def _credentials(url: Url) -> tuple[str, str] | None:
    if bool(url.username) != bool(url.password):
        raise ConfigError("a URL with an access key has its secret, too: s3://key:secret@bucket")
    return (url.username, url.password) if url.username else None


def _expect_credentials(endpoint: str) -> None:
    """Outside of Amazon's cloud, no machine has any to give."""
    amazons = _AMAZON.fullmatch(parse_url(endpoint).host)
    if not amazons and not any(map(environment_text, _CREDENTIALS)):
        raise ConfigError(
            f"no credentials for {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
