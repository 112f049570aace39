"""The tutorial's files are real: they are written out as they stand, and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache.core.backend import StorageBackend
from lmcache.core.errors import BackendError
from lmcache.testing import BackendSuite

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-backend.md"
BLOCK = re.compile(r'^```(\w*)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text())
FILES = {title: body for _, title, body in BLOCKS if title}


@pytest.fixture
def folder(tmp_path):
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    return tmp_path


def run(folder: Path, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_python_block_is_a_file_that_runs():
    python = [title for language, title, _ in BLOCKS if language == "python"]
    assert python[0] == "lmcache_shelf.py"
    assert len(python) > 1
    assert all(title.startswith("test_") for title in python[1:])


def test_the_backend_conforms(folder):
    shown = run(folder, "pytest", "-q", "-W", "error", "-p", "no:cacheprovider")
    assert re.search(r"\d+ passed, 1 xfailed", shown), shown


def test_the_package_is_found_and_its_url_checked(folder):
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(folder, "pip", "install", *offline, "--target", folder / "site", folder)
    (folder / "lmcache_shelf.py").unlink()
    (command,) = (body for language, _, body in BLOCKS if language == "console")
    program, *args = command.removeprefix("$ ").split()
    assert program == "pytest"
    assert " passed" in run(folder / "site", program, *args)


def test_the_page_names_the_whole_interface():
    page = PAGE.read_text()
    methods = {name for name, value in vars(StorageBackend).items() if callable(value)}
    for name in sorted(methods - {"__enter__", "__exit__"}):
        assert f"`{name}`" in page
    for field in StorageBackend.capabilities.__dataclass_fields__:
        assert f"`{field}`" in page
    # a backend may have some of its own
    theirs = [e for e in BackendError.__subclasses__() if e.__module__ == BackendError.__module__]
    for error in (BackendError, *theirs):
        assert f"`{error.__name__}`" in page


def test_the_rules_that_the_page_excuses_exist():
    excused = re.findall(r"def (test_\w+)", FILES["test_shelf_with_an_excuse.py"])
    assert all(hasattr(BackendSuite, name) for name in excused)
