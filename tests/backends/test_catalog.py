from __future__ import annotations

import errno
import os

import pytest
from disk_rig import key

from lmcache.backends.catalog import Catalog, Place
from lmcache.backends.journal import REMOVED, Journal, Record
from lmcache.core.errors import BackendClosed


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "journal")


@pytest.fixture
def catalog(path):
    catalog = Catalog(path)
    yield catalog
    catalog.close()


def test_the_last_word_holds(catalog):
    assert catalog.find(key(1)) is None
    catalog.store(key(1), Place(7, 0, 100))
    catalog.store(key(1), Place(8, 4096, 200))
    assert catalog.find(key(1)) == Place(8, 4096, 200)
    assert catalog.remove(key(1)) == Place(8, 4096, 200)
    assert catalog.remove(key(1)) is None
    assert catalog.find(key(1)) is None


def test_a_segment_holds_what_was_not_moved_away(catalog):
    for n in range(4):
        catalog.store(key(n), Place(7, n * 8192, 5000))
    assert (catalog.holds(7), catalog.end_of(7)) == (True, 4 * 8192)
    catalog.store(key(3), Place(8, 0, 0))
    assert (catalog.end_of(7), catalog.end_of(8)) == (3 * 8192, 4096)
    catalog.remove(key(2))
    catalog.store(key(2), Place(7, 4 * 8192, 1))  # in another place of the same
    assert catalog.end_of(7) == 4 * 8192 + 4096
    assert sorted(catalog.segments()) == [7, 8]
    catalog.drop(7)
    assert [catalog.find(key(n)) for n in range(4)] == [None] * 3 + [Place(8, 0, 0)]
    assert (catalog.holds(7), catalog.end_of(7), catalog.segments()) == (False, 0, [8])
    catalog.remove(key(3))
    catalog.drop(8)
    assert catalog.segments() == []


def test_a_full_segment_ends_with_what_came_last(catalog):
    for n in range(2):
        catalog.store(key(n), Place(7, n * 8192, 5000))
    assert [catalog.is_full(7, size) for size in (2 * 8192, 3 * 8192)] == [True, False]
    catalog.remove(key(1))
    assert not catalog.is_full(7, 2 * 8192)
    assert not catalog.is_full(8, 0)


def test_what_there_is_no_room_to_say_is_known_to_others(catalog, path, monkeypatch):
    other = Catalog(path)
    for n in range(3):
        catalog.store(key(n), Place(n, 0, 1))
    assert catalog.drop(0) is True
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)
        assert catalog.drop(1) is False
    assert [catalog.find(key(n)) is None for n in range(3)] == [True, True, False]
    assert [other.find(key(n)) is None for n in range(3)] == [True, False, False]
    other.close()


def test_a_word_about_an_old_place_is_void(catalog, path):
    catalog.store(key(1), Place(8, 0, 1))
    other = Journal(path)
    other.append(Record(key(1), 7, 0, 1, REMOVED))
    assert catalog.find(key(1)) == Place(8, 0, 1)
    other.append(Record(key(1), 8, 0, 1, REMOVED))
    assert catalog.find(key(1)) is None
    other.close()


def test_leading_keys_are_counted(catalog):
    for n in (0, 1, 3):
        catalog.store(key(n), Place(7, 0, 1))
    cases = [[], [2], [1, 0, 3], [3, 2]]
    counts = [catalog.count_leading([key(n) for n in case]) for case in cases]
    assert counts == [0, 0, 3, 1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_journal_is_shortened_where_there_is_room(catalog, path, monkeypatch, code):
    monkeypatch.setattr("lmcache.backends.catalog._SLACK", 10)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    for _ in range(12):
        catalog.store(key(1), Place(7, 0, 1))
    catalog.shorten()
    assert os.path.getsize(path) == 12 * 64  # it is worth it from 13 on
    catalog.store(key(1), Place(7, 0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        if code == errno.ENOSPC:
            catalog.shorten()
        else:
            with pytest.raises(OSError, match="Input/output"):
                catalog.shorten()
    assert os.path.getsize(path) == 13 * 64
    catalog.shorten()
    assert os.path.getsize(path) == 64
    assert catalog.find(key(1)) == Place(7, 0, 1)


def test_closed_means_closed(path):
    catalog = Catalog(path)
    catalog.close()
    catalog.close()
    for call in (catalog.find, catalog.remove, lambda k: catalog.store(k, Place(1, 2, 3))):
        with pytest.raises(BackendClosed):
            call(key(1))


def test_what_is_stored_while_the_journal_cannot_be_shortened_is_known(catalog, monkeypatch):
    create = Journal._create

    def create_slowly(journal):
        catalog.store(key(2), Place(7, 4096, 100))
        return create(journal)

    def no_room(*args):
        raise OSError(errno.ENOSPC, "no room")

    for _ in range(9):
        catalog.store(key(1), Place(7, 0, 100))
    monkeypatch.setattr("lmcache.backends.catalog._SLACK", 0)
    monkeypatch.setattr(Journal, "_create", create_slowly)
    monkeypatch.setattr(os, "symlink", no_room)
    catalog.shorten()
    assert catalog.find(key(2)) == Place(7, 4096, 100)
    assert catalog.find(key(1)) == Place(7, 0, 100)
