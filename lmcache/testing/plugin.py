"""Options of the conformance kits; opt in with `-p lmcache.testing.plugin`.

There is no entry point for pytest: it would import this package into every test run on a machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("lmcache").addoption(
        "--lmcache-backend", metavar="URL", help="check the storage backend at this URL"
    )
