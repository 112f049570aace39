from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from lmcache.backends.memory import MemoryBackend
from lmcache.cli.bench import app
from lmcache.cli.bench_backend import BESIDE, FIGURES, measure
from lmcache.core.errors import BackendError, ConfigError
from lmcache.plugins.manager import PluginManager
from lmcache.testing.faults import Corrupting, Flaky

KIB = 1024


def run(*words):
    done = CliRunner().invoke(app, ["backend", *words], obj=PluginManager())
    if isinstance(done.exception, Exception):
        raise done.exception
    return done


def test_a_sound_backend(capsys):
    done = run("memory://", *"--size 64KiB --size 1KiB --depth 1 --depth 3 --total 1MiB".split())
    assert done.exit_code == 0
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert header[:6] == ["size", "depth", "objects", "refused", "missed", "wrong"]
    assert [row[:6] for row in rows] == [
        ["65536", "1", "16", "0", "0", "0"],
        ["65536", "3", "16", "0", "0", "0"],
        ["1024", "1", "1024", "0", "0", "0"],
        ["1024", "3", "1024", "0", "0", "0"],
    ]


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_beside_files_stands_what_fio_reaches(tmp_path):
    url = f"file://{tmp_path}?max_size=1GB"
    done = run(url, *"--size 256KiB --depth 2 --total 4MiB --rounds 1 --format json".split())
    said = json.loads(done.stdout)
    assert said["url"] == url
    [row] = said["rows"]
    assert row["wrong"] == row["missed"] == row["refused"] == 0
    assert all(row[name] > 0 for name in FIGURES)
    for name, (ours, theirs) in BESIDE.items():
        assert row[ours] > 0 < row[theirs]
        assert row[name] == pytest.approx(row[ours] / row[theirs])
    assert not list(tmp_path.glob("fio-*"))


def test_wrong_bytes_are_seen():
    row = measure(Corrupting(MemoryBackend(), every=4), 1000, 2, 20)
    assert (row["wrong"], row["missed"], row["refused"]) == (5, 0, 0)


def test_what_is_refused_or_lost_is_counted_and_not_timed():
    row = measure(MemoryBackend(max_size=10 * KIB), KIB, 1, 15)
    assert (row["wrong"], row["missed"], row["refused"]) == (0, 5, 0)
    row = measure(MemoryBackend(max_size=10), KIB, 1, 15)
    assert (row["wrong"], row["missed"], row["refused"]) == (0, 15, 15)
    assert row["put_gb_s"] == row["get_gb_s"] == row["get_p50_ms"] == 0


@pytest.mark.parametrize("count", [3, 15], ids=["when it removes", "when it stores"])
def test_a_backend_that_fails_ends_it(count):
    with pytest.raises(BackendError):
        measure(Flaky(MemoryBackend(), every=7), KIB, 1, count)


def test_nothing_of_it_stays():
    backend = MemoryBackend()
    measure(backend, KIB, 4, 20)
    assert backend._size == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nowhere://"], "no storage backend 'nowhere'"),
        (["memory://", "--size", "many"], "'many' is not a size"),
        (["memory://", "--size", "2MiB", "--total", "1MiB"], "--total says more"),
        (["memory://", "--size", "0"], "objects of 1 to"),
    ],
)
def test_mistakes_are_named(words, why):
    with pytest.raises(ConfigError, match=why):
        run(*words)
