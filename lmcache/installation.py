"""Tells when LMCache/LMCache, which installs under the same names, is mixed with this package."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import lmcache
from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MARKS = ("v1/storage_backend", "v1/distributed")
"""Parts of LMCache/LMCache that this package never has."""


def check_installation(
    package: Iterable[str] = lmcache.__path__, search_path: Iterable[str] | None = None
) -> None:
    """Raise `ConfigError` if parts of LMCache/LMCache could be imported along with ours.

    `package` is where our modules are looked for, `search_path` stands for `sys.path`.
    """
    for reason in _reasons(list(package), list(sys.path if search_path is None else search_path)):
        raise ConfigError(
            f"two packages named lmcache are mixed: {reason}; uninstall lmcache until none is left,"
            " then install one of them"
        )


def _reasons(package: list[str], search_path: list[str]) -> Iterator[str]:
    for directory in package:
        if _is_foreign(Path(directory)):
            yield f"files of LMCache/LMCache lie in {directory}"
    for entry in search_path:
        if _is_foreign(Path(entry, "lmcache")):
            yield f"LMCache/LMCache is installed in {entry}, this package in {package[0]}"
    for distribution in metadata.distributions(name="lmcache", path=search_path):
        record = distribution.read_text("RECORD") or ""
        if any(f"lmcache/{mark}" in record for mark in _MARKS):
            yield f"the installed lmcache {distribution.version} is that of LMCache/LMCache"


def _is_foreign(directory: Path) -> bool:
    return any((directory / mark).exists() for mark in _MARKS)
