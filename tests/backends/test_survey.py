"""Looking through a directory that others use never makes its sum too low."""

from __future__ import annotations

import random
import threading

import pytest
from disk_rig import (
    MB,
    eventually,
    files,
    got,
    grow_old,
    is_settled,
    key,
    ledger_and_truth,
    pattern,
    present,
    put,
)

from lmcache.backends.disk import DiskBackend
from lmcache.backends.ledger import Ledger
from lmcache.backends.survey import Survey
from lmcache.core.errors import BackendClosed


@pytest.fixture
def survey(tmp_path):
    ledger = Ledger(f"{tmp_path}/usage")
    survey = Survey(str(tmp_path), ledger)
    yield survey
    survey.close()
    ledger.close()


def filled(root, numbers, size=5000, **options):
    with DiskBackend(root, min_free=0, **options) as backend:
        assert all(put(backend, n, size) for n in numbers)


class TestASurvey:
    def test_lists_the_least_recently_used_first(self, tmp_path, survey):
        filled(tmp_path, range(20))
        grow_old(tmp_path)
        with DiskBackend(tmp_path) as backend:
            assert got(backend, 3)
            assert got(backend, 0)
        assert survey.wait() is True
        order = [key(n).hex() for n in (1, 2, *range(4, 20), 3, 0)]
        assert [candidate.name for candidate in survey.candidates] == order

    def test_of_nothing_finds_nothing(self, survey):
        assert survey.wait() is False

    def test_puts_right_what_people_did(self, tmp_path, survey):
        filled(tmp_path, range(30))
        for path in files(tmp_path, ".kv")[:7]:
            path.unlink()
        copy = files(tmp_path, ".kv")[0]
        copy.with_name(f"{copy.name[:50]}{'0' * 14}.kv").write_bytes(bytes(9000))
        assert not is_settled(tmp_path)
        assert survey.wait() is True
        assert ledger_and_truth(tmp_path) == (23 * 8192 + 12288,) * 2

    def test_puts_right_leaves_that_are_gone(self, tmp_path, survey):
        filled(tmp_path, range(30))
        for path in files(tmp_path, ".kv"):
            path.unlink()
            path.parent.rmdir()
        assert survey.wait() is False
        assert ledger_and_truth(tmp_path) == (0, 0)

    def test_is_made_again_before_candidates_run_out(self, tmp_path, survey):
        filled(tmp_path, range(40))
        survey.wait()
        with survey._ledger:
            taken = [survey.next() for _ in range(31)]
        assert len(set(taken)) == 31
        eventually(lambda: len(survey.candidates) == 40)

    def test_ends_when_it_is_closed(self, tmp_path):
        filled(tmp_path, range(200), size=1)
        ledger = Ledger(f"{tmp_path}/usage")
        survey = Survey(str(tmp_path), ledger)
        begun = survey.begin()
        survey.close()
        assert begun.done()
        with pytest.raises(BackendClosed):
            survey.wait()
        survey.close()
        ledger.close()

    def test_tells_those_who_wait_what_went_wrong(self, tmp_path, survey):
        filled(tmp_path, range(3))
        (tmp_path / "usage").unlink()
        with pytest.raises(Exception, match="was removed; open the backend again"):
            survey.wait()


def test_the_sum_is_never_too_low_while_everything_changes(tmp_path, survey):
    """Two backends put, replace, remove and evict; surveys go on meanwhile."""
    done, low = threading.Event(), []
    numbers = range(60)

    def change(backend, seed: int) -> None:
        draw = random.Random(seed)
        while not done.is_set():
            n = draw.choice(numbers)
            if draw.random() < 0.2:
                backend.remove(key(n))
            else:
                put(backend, n, draw.randrange(60_000))

    def observe() -> None:
        while not done.is_set():
            used, truth = ledger_and_truth(tmp_path)
            if used < truth or used > MB:
                low.append((used, truth))

    with (
        DiskBackend(tmp_path, max_size=MB, min_free=0) as one,
        DiskBackend(tmp_path, max_size=MB, min_free=0) as two,
    ):
        threads = [threading.Thread(target=change, args=(b, s)) for s, b in enumerate((one, two))]
        threads.append(threading.Thread(target=observe))
        for thread in threads:
            thread.start()
        for _ in range(15):
            survey.wait()
        done.set()
        for thread in threads:
            thread.join(60)
    assert not low
    survey.wait()
    assert is_settled(tmp_path)


class TestOpening:
    def test_a_counted_directory_is_not_looked_through(self, tmp_path, monkeypatch):
        """Nothing waits for a scan that takes for ever."""
        filled(tmp_path, range(10))
        gate = threading.Event()
        real = Survey._objects
        monkeypatch.setattr(
            Survey, "_objects", lambda self: (gate.wait(30), real(self))[1], raising=True
        )
        backend = DiskBackend(tmp_path, max_size=MB, min_free=0)
        assert present(backend, range(10)) == [*range(10)]
        assert put(backend, 10, 5000)
        assert got(backend, 10) == pattern(10, 5000)
        gate.set()
        backend.close()

    def test_what_was_never_counted_is(self, tmp_path):
        filled(tmp_path, range(100))
        (tmp_path / "usage").unlink()
        with DiskBackend(tmp_path, max_size=50 * 8192, min_free=0):
            assert ledger_and_truth(tmp_path) == (50 * 8192, 50 * 8192)

    def test_a_sum_that_is_too_high_evicts_nothing(self, tmp_path):
        filled(tmp_path, range(10))
        ledger = Ledger(f"{tmp_path}/usage")
        with ledger:
            ledger.charge(0, 10 * MB)  # as if somebody was killed before he wrote
        ledger.close()
        with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
            assert present(backend, range(10)) == [*range(10)]
            assert ledger_and_truth(tmp_path) == (10 * 8192, 10 * 8192)

    def test_more_than_a_survey_lists_can_go(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lmcache.backends.survey._CANDIDATES", 7)
        monkeypatch.setattr("lmcache.backends.budget._DROPS", 3)
        filled(tmp_path, range(60))
        with DiskBackend(tmp_path, max_size=8 * 8192, min_free=0) as backend:
            assert present(backend, range(60)) == [*range(52, 60)]
            # nor does a single put need to find its room in one list
            assert put(backend, 100, 8 * 8192)
            assert present(backend, range(101)) == [100]
