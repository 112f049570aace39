"""Whatever memory a view lies in: its bytes go to their place, and nothing else is touched."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.backends.direct import BLOCK, Transfer, padded, transfer_beside
from lmcache.core.errors import ConfigError

ROOM = 3 << 20
POISON = 0xA5
LENGTHS = st.one_of(
    st.integers(0, 3 * BLOCK),
    st.builds(lambda blocks, more: blocks * BLOCK + more, st.integers(0, 512), st.integers(-1, 1))
    .filter(lambda length: length >= 0),
)  # fmt: skip
OFFSETS = st.one_of(st.just(0), st.integers(0, BLOCK))
MODES = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


@pytest.fixture(scope="module")
def noise():
    return os.urandom(ROOM)


def region() -> memoryview:
    """Memory that begins a page, filled with poison."""
    memory = memoryview(mmap.mmap(-1, ROOM + 2 * BLOCK))
    memory[:] = bytes([POISON]) * len(memory)
    return memory


def written(path, transfer: Transfer, view: memoryview, place: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | transfer.flags, 0o600)
    transfer.write(fd, view, place)
    os.close(fd)


def filled(path, transfer: Transfer, view: memoryview, place: int = 0) -> bool:
    fd = os.open(path, os.O_RDONLY | transfer.flags)
    try:
        return transfer.read(fd, view, place)
    finally:
        os.close(fd)


@MODES
@settings(deadline=None, max_examples=60)
@given(length=LENGTHS, at=OFFSETS, to=OFFSETS, blocks=st.integers(0, 3))
def test_any_view_goes_to_its_place_and_comes_back(
    tmp_path_factory, noise, direct, length, at, to, blocks
):
    path, place = tmp_path_factory.getbasetemp() / "object", blocks * BLOCK
    end = place + padded(length)
    path.write_bytes(bytes([POISON]) * (end + BLOCK))
    transfer = Transfer(direct=direct)
    memory = region()
    view = memory[at : at + length]
    view[:] = noise[:length]
    written(path, transfer, view.toreadonly(), place)
    data = path.read_bytes()
    assert data[place : place + length] == noise[:length]
    assert view == noise[:length]
    # what lies in the last block behind the end is nobody else's memory
    behind = data[place + length : end]
    assert behind == bytes([0 if direct and length else POISON]) * len(behind)
    assert set(data[:place] + data[end:]) == {POISON}
    out = region()
    assert filled(path, transfer, out[to : to + length], place) is True
    assert out[to : to + length] == noise[:length]
    assert out[:to] == bytes([POISON]) * to
    assert out[to + length :] == bytes([POISON]) * (len(out) - to - length)


@MODES
@settings(deadline=None, max_examples=40)
@given(data=st.data(), length=LENGTHS.filter(bool), to=OFFSETS)
def test_a_file_that_ends_before_is_found_out(tmp_path_factory, noise, direct, data, length, to):
    path = tmp_path_factory.getbasetemp() / "object"
    path.write_bytes(noise[: data.draw(st.integers(0, length - 1), label="left")])
    memory = region()
    assert filled(path, Transfer(direct=direct), memory[to : to + length]) is False
    assert memory[to + length :] == bytes([POISON]) * (len(memory) - to - length)


@pytest.mark.parametrize("at", [0, 100])
@MODES
def test_calls_that_do_half_are_continued(tmp_path, noise, monkeypatch, direct, at):
    """In whole blocks, as the kernel does it on the way past the page cache."""
    real, real_write, real_read = os.pwrite, os.pwritev, os.preadv

    def some(views):
        goal = sum(map(len, views)) // 3 // BLOCK * BLOCK or BLOCK
        for view in views:
            yield view[:goal]
            goal -= len(view[:goal])

    path, transfer, length = tmp_path / "object", Transfer(direct=direct), 30 * BLOCK + 7
    memory = region()
    memory[at : at + length] = noise[:length]
    monkeypatch.setattr(os, "pwrite", lambda fd, view, to: real(fd, next(some([view])), to))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, to: real_write(fd, [*some(views)], to))
    monkeypatch.setattr(os, "preadv", lambda fd, views, to: real_read(fd, [*some(views)], to))
    written(path, transfer, memory[at : at + length])
    assert path.read_bytes()[:length] == noise[:length]
    out = region()
    assert filled(path, transfer, out[at : at + length]) is True
    assert out[at : at + length] == noise[:length]


def test_the_page_cache_is_passed(tmp_path, noise):
    """Nothing of the file is in memory afterwards; that is what it is for."""
    if not transfer_beside(some_file(tmp_path), direct=None).direct:
        pytest.skip("this file system has no way past the page cache")
    resident = {}
    for direct in (True, False):
        path, memory = tmp_path / f"{direct}", region()
        written(path, Transfer(direct=direct), memory[: 1 << 20])
        assert filled(path, Transfer(direct=direct), memory[: 1 << 20])
        resident[direct] = resident_pages(path)
    if resident[False] != 256:
        pytest.skip("the page cache of this file system cannot be looked into")
    assert resident[True] == 0


def resident_pages(path) -> int:
    done = subprocess.run(
        ["fincore", "--noheadings", "--output", "PAGES", path],
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    return int(done.stdout) if done.returncode == 0 else -1


def some_file(folder) -> str:
    (folder / "some").write_bytes(b"x")
    return str(folder / "some")


class TestWhereThereIsNoWay:
    @pytest.fixture
    def path(self, tmp_path):
        """A file in a file system that lives in the page cache."""
        where = tmp_path / "ram"
        where.mkdir()
        mount = ["mount", "-t", "ramfs", "ramfs", where]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a ramfs here")
        try:
            path = some_file(where)
            yield path
        finally:
            subprocess.run(["umount", where], check=True)

    def test_files_go_through_the_page_cache(self, path):
        assert transfer_beside(path, direct=None).direct is False
        assert transfer_beside(path, direct=False).direct is False

    def test_asking_for_it_is_a_mistake(self, path):
        with pytest.raises(ConfigError, match="no way past the page cache; leave out direct=true"):
            transfer_beside(path, direct=True)


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_a_refusal_is_understood_whenever_it_comes(tmp_path, monkeypatch, where):
    def refuse(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    path = some_file(tmp_path)
    monkeypatch.setattr(os, where, refuse)
    assert transfer_beside(path, direct=None).direct is False


def test_another_failure_is_none_of_its_business(tmp_path):
    with pytest.raises(FileNotFoundError):
        transfer_beside(str(tmp_path / "absent"), direct=None)
