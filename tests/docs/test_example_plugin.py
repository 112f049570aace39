"""The example package installs, is found, and conforms."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "lmcache-sqlite"


def run(*args: object, site: Path, cwd: Path, **variables: str) -> str:
    """Run this Python with `site` in front of its path; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(site), **variables},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where a copy of the package is installed; neither this environment nor the tree changes."""
    where = tmp_path_factory.mktemp("site")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / EXAMPLE.name)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *offline, "--target", where, source, site=where, cwd=where)
    return where


LIST = """
import sys
from lmcache.plugins.manager import PluginManager
plugins = PluginManager()
print(*sorted(plugins.backends))
if "sqlite" in plugins.backends:
    with plugins.open_backend("sqlite://" + sys.argv[1]) as backend:
        print(type(backend).__module__)
"""


def test_it_is_found_by_its_entry_point(site, tmp_path):
    schemes, module = run("-c", LIST, tmp_path / "kv.db", site=site, cwd=tmp_path).splitlines()
    assert "sqlite" in schemes.split()
    assert "file" in schemes.split()
    assert module == "lmcache_sqlite"


def test_it_can_be_disabled(site, tmp_path):
    shown = run(
        "-c", LIST, tmp_path / "kv.db", site=site, cwd=tmp_path, LMCACHE_DISABLED_PLUGINS="sqlite"
    )
    assert "sqlite" not in shown.split()


def test_it_passes_its_own_tests(site, tmp_path):
    tests = shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    shown = run("-m", "pytest", "-q", "-W", "error", tests, site=site, cwd=tmp_path)
    assert " passed" in shown
    assert "skipped" not in shown


def test_a_database_is_checked_by_its_url(site, tmp_path):
    check = ("-p", "lmcache.testing.plugin", "--pyargs", "lmcache.testing.check_url")
    url = f"sqlite://{tmp_path}/kv.db"
    shown = run("-m", "pytest", "-q", *check, "--lmcache-backend", url, site=site, cwd=tmp_path)
    assert " passed" in shown


def test_the_readme_is_short_and_names_the_scheme():
    readme = (EXAMPLE / "README.md").read_text()
    assert len(readme.splitlines()) <= 15
    assert "sqlite:///" in readme
