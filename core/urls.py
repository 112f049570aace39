"""URLs that name a storage location, and the sizes written in their options.

    file:///var/cache/kv?max_size=100GB&min_free=1GiB

Options are checked when the URL is parsed, so that a misspelt one stops the start-up. No message
made here repeats a user or a password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

from lmcache.core.errors import ConfigError
from lmcache.core.redact import redact_value

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power
_MOST = 999_999_999
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_OPTION = re.compile(r"[a-z][a-z0-9_]*")


def parse_size(text: str) -> int:
    """The bytes in a size such as `4096`, `500MB` or `1.5GiB`.

    `kB`, `MB`, `GB`, `TB`, `PB` are powers of 1000, as disks are sold; `KiB`, `MiB`, `GiB`, `TiB`,
    `PiB` are powers of 1024, as memory is. Case does not matter. A bare `G` could mean either and
    is refused.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"{text!r} is not a size; write bytes, or a number with a unit: "
            "GB is 1000**3 bytes, GiB is 1024**3"
        )
    return int(Fraction(match[1]) * unit)


def parse_count(option: str, text: str, most: int = _MOST) -> int:
    """The whole number that an option says, 1 to `most`."""
    if not text.isdecimal() or not 1 <= int(text[:10]) <= most:
        raise ConfigError(f"option {option!r}: {text!r} is not a whole number, 1 to {most}")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Url:
    """What a URL says. Everything is percent-decoded; an absent part is empty."""

    scheme: str
    host: str
    port: int | None
    path: str
    username: str = field(repr=False)
    password: str = field(repr=False)
    options: Mapping[str, str] = field(repr=False)

    def size(self, option: str) -> int | None:
        """The bytes that `option` says, or None if it is not given."""
        if option not in self.options:
            return None
        try:
            return parse_size(self.options[option])
        except ConfigError as error:
            raise ConfigError(f"option {option!r}: {error}") from None

    def count(self, option: str) -> int | None:
        """The whole number that `option` says, 1 to 999999999, or None if it is not given."""
        text = self.options.get(option)
        return None if text is None else parse_count(option, text)

    def flag(self, option: str) -> bool:
        """Whether `option` is true; it is false if it is not given."""
        text = self.options.get(option, "false")
        if text not in ("true", "false"):
            raise ConfigError(f"option {option!r}: {text!r} is neither true nor false")
        return text == "true"


def parse_url(url: str, *, options: Collection[str] = ()) -> Url:
    """Parse `url`, which may carry each of `options` once and no other."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        port = parts.port
    except ValueError:
        # not chained: the text of the original may quote the password
        raise ConfigError(f"malformed URL {redact_value(url)!r}") from None
    path = unquote(parts.path, errors="surrogateescape")
    if not _SCHEME.match(url) or "\0" in path:
        raise ConfigError(f"malformed URL {redact_value(url)!r}; write scheme://...")
    if parts.fragment or not all(_OPTION.fullmatch(name) for name, _ in query):
        raise ConfigError(
            f"malformed options in {redact_value(url)!r}; write a '#' as %23 and a '?' as %3F"
        )
    return Url(
        scheme=parts.scheme,
        host=parts.hostname or "",
        port=port,
        path=path,
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        options=_checked(query, options, parts.scheme),
    )


def _checked(query: list[tuple[str, str]], known: Collection[str], scheme: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in query:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "it takes none"
            raise ConfigError(f"unknown option {name!r} in a {scheme!r} URL; {hint}")
        if name in found:
            raise ConfigError(f"option {name!r} is given twice in a {scheme!r} URL")
        found[name] = value
    return found


def take_options(url: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """Split the options in `names` off `url`: the rest of the URL, and their values.

    For a layer that has options of its own in a URL it hands on, such as `codec` of a tier.
    """
    head, _, query = url.partition("?")
    kept, taken = [], {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name not in names:
            kept.append(part)
        elif name in taken:
            raise ConfigError(f"option {name!r} is given twice in {redact_value(url)!r}")
        else:
            taken[name] = unquote_plus(value)
    return "?".join(filter(None, (head, "&".join(kept)))), taken


__all__ = ["Url", "parse_count", "parse_size", "parse_url", "take_options"]
