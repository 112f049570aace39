from __future__ import annotations

from pathlib import Path

import pytest

from lmcache.core.errors import ConfigError
from lmcache.installation import check_installation


def package(directory: Path, *parts: str) -> Path:
    """A package `lmcache` in `directory` that has those folders."""
    root = directory / "lmcache"
    root.mkdir(parents=True)
    (root / "__init__.py").touch()
    for part in parts:
        (root / part).mkdir(parents=True)
    return root


def distribution(directory: Path, version: str, *files: str) -> None:
    """What pip notes of a distribution `lmcache` with those files."""
    info = directory / f"lmcache-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmcache\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))


def test_this_installation_is_sound() -> None:
    check_installation()


def test_ours_alone_is_sound_wherever_it_lies(tmp_path: Path) -> None:
    ours = package(tmp_path / "one", "core", "v1")
    package(tmp_path / "two", "core")
    distribution(tmp_path / "two", "1.0.0", "lmcache/__init__.py", "lmcache/core/config.py")
    check_installation([str(ours)], [str(tmp_path / "one"), str(tmp_path / "two"), "/nowhere"])


def test_files_of_upstream_among_ours(tmp_path: Path) -> None:
    ours = package(tmp_path, "core", "v1/storage_backend")
    with pytest.raises(ConfigError, match=f"files of LMCache/LMCache lie in {ours}; uninstall"):
        check_installation([str(ours)], [])


def test_a_second_package_on_the_path(tmp_path: Path) -> None:
    ours = package(tmp_path / "ours", "core")
    package(tmp_path / "theirs", "v1/storage_backend")
    with pytest.raises(ConfigError, match=f"is installed in {tmp_path / 'theirs'}, this package"):
        check_installation([str(ours)], [str(tmp_path / "ours"), str(tmp_path / "theirs")])


def test_a_distribution_whose_files_are_gone(tmp_path: Path) -> None:
    ours = package(tmp_path / "ours", "core")
    distribution(tmp_path / "site", "0.5.6", "lmcache/v1/storage_backend/__init__.py")
    with pytest.raises(ConfigError, match=r"the installed lmcache 0\.5\.6 is that of LMCache"):
        check_installation([str(ours)], [str(tmp_path / "site")])
