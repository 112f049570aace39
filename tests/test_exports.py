from __future__ import annotations

import types

import pytest

import lmcache


def test_all_is_sorted_and_without_doubles() -> None:
    assert lmcache.__all__ == sorted(set(lmcache.__all__))


@pytest.mark.parametrize("name", lmcache.__all__)
def test_everything_in_all_is_there(name: str) -> None:
    assert getattr(lmcache, name) is not None
    assert name in dir(lmcache)


def test_everything_public_is_in_all() -> None:
    for name in lmcache.__all__:
        getattr(lmcache, name)
    internal = {"TYPE_CHECKING", "annotations", "import_module"}
    public = {
        name
        for name, value in vars(lmcache).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - internal <= set(lmcache.__all__)


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lmcache.nothing  # noqa: B018


def test_the_classes_are_those_of_the_core() -> None:
    from lmcache.core.backend import StorageBackend
    from lmcache.plugins import hookimpl

    assert lmcache.StorageBackend is StorageBackend
    assert lmcache.hookimpl is hookimpl
