from __future__ import annotations

import errno
import hashlib
import os
import threading
import zlib
from contextlib import suppress
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.backends.journal import GONE, REMOVED, STORED, VOID, Journal, Record
from lmcache.core.errors import BackendClosed, BackendError

KEYS = st.binary(min_size=32, max_size=32)
NUMBERS = st.integers(0, 2**64 - 1)
RECORDS = st.builds(Record, KEYS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from([STORED, REMOVED]))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "journal")


def record(n: int) -> Record:
    return Record(hashlib.sha256(b"%d" % n).digest(), n, 2 * n, 3 * n, STORED)


def test_its_bytes_are_these(path):
    journal = Journal(path)
    journal.append(Record(bytes(range(32)), 0x0102, 0x0304, 0x0506, GONE))
    with open(path, "rb") as file:
        raw = file.read()
    assert raw[:60] == (
        bytes(range(32)) + b"\x02\x01" + bytes(6) + b"\x04\x03" + bytes(6)
        + b"\x06\x05" + bytes(6) + b"\x03" + bytes(3)
    )  # fmt: skip
    assert raw[60:] == zlib.crc32(raw[:60]).to_bytes(4, "little")
    journal.close()


@given(said=st.lists(st.tuples(st.integers(0, 1), RECORDS)))
def test_all_follow_what_anybody_says(tmp_path_factory, said):
    path = str(tmp_path_factory.mktemp("journal") / "journal")
    journals, heard = [Journal(path), Journal(path)], [[], []]
    for who, what in said:
        journals[who].append(what)
        heard[who] += journals[who].news()
    for who, journal in enumerate(journals):
        heard[who] += journal.news()
        assert heard[who] == [what for _, what in said]
        assert journal.records == len(said)
        assert list(journal.news()) == []
        journal.close()


def test_many_are_followed_in_pieces(path, monkeypatch):
    monkeypatch.setattr("lmcache.backends.journal._PIECE", 200)
    one, two = Journal(path), Journal(path)
    for n in range(20):
        one.append(record(n))
    assert list(two.news()) == [record(n) for n in range(20)]
    one.close()
    two.close()


@given(at=st.integers(0, 5 * 64 - 1), bit=st.integers(0, 7), cut=st.integers(0, 5 * 64))
def test_what_is_damaged_means_nothing_and_the_rest_holds(tmp_path_factory, at, bit, cut):
    path = str(tmp_path_factory.mktemp("journal") / "journal")
    journal = Journal(path)
    for n in range(5):
        journal.append(record(n))
    journal.close()
    with open(path, "r+b") as file:
        raw = bytearray(file.read())
        raw[at] ^= 1 << bit
        file.seek(0)
        file.write(raw)
        file.truncate(cut)
    journal = Journal(path)
    assert list(journal.news()) == [record(n) for n in range(cut // 64) if n != at // 64]
    journal.tidy()
    journal.append(record(9))
    assert list(journal.news()) == [record(9)]
    journal.close()


def test_a_new_file_voids_what_came_before_and_loses_nothing(path):
    one, two = Journal(path), Journal(path)
    for n in range(5):
        one.append(record(n))
    assert len(list(one.news())) == len(list(two.news())) == 5

    def kept():
        two.append(record(7))  # while it is being rewritten
        yield record(3)

    one.rewrite(kept())
    two.append(record(8))
    expected = [VOID, record(3), record(7), record(8)]
    assert list(one.news()) == expected
    assert list(two.news()) == expected
    assert sorted(os.listdir(os.path.dirname(path))) == ["journal", os.readlink(path)]
    one.close()
    two.close()


def test_threads_that_append_while_it_is_rewritten_lose_nothing(path):
    writers = [Journal(path) for _ in range(3)]
    rewriter, known, done = Journal(path), {}, threading.Event()

    def write(number: int) -> None:
        for n in range(number * 1000, number * 1000 + 1000):
            writers[number].append(record(n))

    def rewrite() -> None:
        while not done.is_set():
            for found in rewriter.news():
                known.clear() if found == VOID else known.update({found[0]: Record(*found)})
            rewriter.rewrite(known.values())

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    rewriting = threading.Thread(target=rewrite)
    for thread in (rewriting, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    done.set()
    rewriting.join(60)
    last = Journal(path)
    assert {found[0] for found in last.news()} == {record(n).key for n in range(3000)}
    for journal in (*writers, rewriter, last):
        journal.close()


@pytest.mark.parametrize("what", ["link", "file"])
def test_one_that_is_gone_voids_all_and_takes_no_more(path, what):
    journal = Journal(path)
    journal.append(record(1))
    assert list(journal.news()) == [record(1)]
    if what == "file":
        os.unlink(os.path.realpath(path))
        os.symlink("journal.0123456789abcdef", f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    else:
        os.unlink(path)
    for _ in range(2):
        assert list(journal.news()) == [VOID]
        with pytest.raises(BackendError, match="was removed; open the backend again"):
            journal.append(record(2))
    journal.close()


def test_one_that_comes_back_holds_again(path):
    journal = Journal(path)
    journal.append(record(1))
    assert list(journal.news()) == [record(1)]
    os.rename(path, f"{path}.away")
    assert list(journal.news()) == [VOID]
    os.rename(f"{path}.away", path)
    assert list(journal.news()) == [VOID, record(1)]
    journal.close()


def test_threads_that_append_through_one_of_them_lose_nothing(path):
    journal, rewriter, known = Journal(path), Journal(path), {}

    def write(number: int) -> None:
        for n in range(number * 1000, number * 1000 + 1000):
            journal.append(record(n))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        known.update((found[0], Record(*found)) for found in rewriter.news() if found != VOID)
        rewriter.rewrite(known.values())
        list(journal.news())
    last = Journal(path)
    assert {found[0] for found in last.news()} == {record(n).key for n in range(3000)}
    for each in (journal, rewriter, last):
        each.close()


def test_who_appends_too_late_changes_nothing_that_is_followed(path, monkeypatch):
    journal, other = Journal(path), Journal(path)
    opened = [threading.Event(), threading.Event()]
    may = [threading.Event(), threading.Event()]
    steps, really_open = iter(zip(opened, may, strict=True)), Journal._open

    def open_slowly(of):
        file = really_open(of)
        if threading.current_thread() is late:
            for is_open, may_go_on in islice(steps, 1):
                is_open.set()
                assert may_go_on.wait(20)
        return file

    monkeypatch.setattr(Journal, "_open", open_slowly)
    other.append(record(1))
    list(other.news())
    other.rewrite([record(1)])
    late = threading.Thread(target=journal.append, args=(record(2),))
    late.start()
    assert opened[0].wait(20)
    list(other.news())
    other.rewrite([])
    assert list(journal.news()) == [VOID]
    may[0].set()
    assert opened[1].wait(20)
    journal.rewrite([])
    may[1].set()
    late.join(20)
    last = Journal(path)
    assert list(last.news()) == [record(2)]
    for each in (journal, other, last):
        each.close()


def test_what_is_appended_while_it_is_closed_is_there_or_refused(path):
    journal, refused = Journal(path), []
    begun = threading.Event()

    def write() -> None:
        with suppress(BackendClosed):
            for n in count():
                refused[:] = [n]
                journal.append(record(n))
                begun.set()

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait(30)
    journal.close()
    thread.join(30)
    last = Journal(path)
    assert [found[0] for found in last.news()] == [record(n).key for n in range(refused[0])]
    with pytest.raises(BackendClosed):
        journal.append(record(0))
    last.close()


def test_one_that_was_cut_is_followed_from_the_start(path):
    journal = Journal(path)
    for n in range(3):
        journal.append(record(n))
    assert len(list(journal.news())) == 3
    os.truncate(path, 64)
    assert list(journal.news()) == [VOID, record(0)]
    journal.close()


@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_no_journal_is_never_opened(path, tmp_path, is_link):
    (tmp_path / "secret").write_bytes(bytes(64))
    if is_link:
        os.symlink("secret", path)
    else:
        os.link(tmp_path / "secret", path)
    journal = Journal(path)
    journal.append(record(1))
    assert (tmp_path / "secret").read_bytes() == bytes(64)
    assert os.readlink(path) != "secret"
    journal.close()


def test_what_killed_processes_left_is_removed(path, tmp_path):
    journal = Journal(path)
    journal.append(record(1))
    (tmp_path / "journal.0000000000000001").write_bytes(b"half")
    os.symlink("journal.0000000000000001", tmp_path / "journal.0000000000000001.new")
    (tmp_path / "journal.of.mine").write_bytes(b"kept")
    journal.tidy()
    assert sorted(os.listdir(tmp_path)) == ["journal", os.readlink(path), "journal.of.mine"]
    assert list(journal.news()) == [record(1)]
    journal.close()


def test_no_room_is_an_error(path, monkeypatch):
    journal = Journal(path)
    monkeypatch.setattr(os, "write", lambda fd, raw: len(raw) - 1)
    with pytest.raises(OSError, match="No space") as caught:
        journal.append(record(1))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        journal.rewrite([record(1)])
    assert sorted(os.listdir(os.path.dirname(path))) == ["journal", os.readlink(path)]
    journal.close()
