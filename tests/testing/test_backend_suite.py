"""The suite is worth shipping only if a backend that breaks a rule fails that rule and no other."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache.backends.memory import MemoryBackend
from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendClosed
from lmcache.testing import BackendSuite

pytest_plugins = ["pytester"]

BROKEN: dict[type[StorageBackend], str] = {}
"""Backends that break one rule each, and that rule."""


def breaks(rule: str):
    def note(cls: type[StorageBackend]) -> type[StorageBackend]:
        BROKEN[cls] = rule
        return cls

    return note


@breaks("test_what_is_put_is_got")
class SpoilsLargeObjects(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        if size and size > 4 << 20:
            out[-1] ^= 1
        return size


@breaks("test_what_is_put_is_got")
class SaysTrueForALength(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        return True if size == 4096 else size


@breaks("test_what_is_put_is_got")
class DoesNotSayThatItStored(MemoryBackend):
    def put(self, key, data):
        return super().put(key, data) if data.nbytes != 4096 else None


@breaks("test_a_miss_leaves_the_buffer_alone")
class ScribblesOnAMiss(MemoryBackend):
    def get_into(self, key, out):
        if not self.contains(key):
            out[0] = 0
        return super().get_into(key, out)


@breaks("test_an_object_larger_than_the_buffer_is_a_miss")
class FillsWhatFits(MemoryBackend):
    def get_into(self, key, out):
        room = memoryview(bytearray(8 << 20))
        size = super().get_into(key, room)
        if size is None or size <= out.nbytes:
            return super().get_into(key, out)
        out[:] = room[: len(out)]
        return len(out)


@breaks("test_an_object_larger_than_the_buffer_is_a_miss")
class FillsWhatFitsOfAMiss(FillsWhatFits):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        return None if size == 4999 else size


@breaks("test_a_larger_buffer_is_filled_at_its_front_only")
class ClearsTheRest(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        if size and size >= 5000:
            out[size:] = bytes(len(out) - size)
        return size


@breaks("test_a_larger_buffer_is_filled_at_its_front_only")
class SaysHowLargeTheBufferIs(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        return size and (out.nbytes if size >= 5000 else size)


@breaks("test_put_copies")
class KeepsTheBuffer(MemoryBackend):
    def put(self, key, data):
        if stored := super().put(key, data):
            self._objects[key] = data.cast("B")
        return stored


@breaks("test_a_view_of_any_format_is_its_bytes")
class CountsItems(MemoryBackend):
    def put(self, key, data):
        return super().put(key, memoryview(data.tobytes()[: len(data)]))


@breaks("test_a_view_of_any_format_is_its_bytes")
class NeedsAWritableBuffer(MemoryBackend):
    def put(self, key, data):
        if data.nbytes == 64 and data.readonly:
            raise TypeError("a writable buffer is needed")
        return super().put(key, data)


@breaks("test_a_view_of_any_format_is_its_bytes")
class NeedsABufferOfBytes(MemoryBackend):
    def get_into(self, key, out):
        if out.format != "B":
            raise TypeError("a buffer of bytes is needed")
        return super().get_into(key, out)


@breaks("test_putting_again_changes_nothing")
class RefusesWhatItHas(MemoryBackend):
    def put(self, key, data):
        return not self.contains(key) and super().put(key, data)


@breaks("test_putting_again_changes_nothing")
class Appends(MemoryBackend):
    def put(self, key, data):
        if data.nbytes == 5000:
            data = memoryview(self._objects.get(key, b"") + bytes(data))
        return super().put(key, data)


@breaks("test_putting_again_shows_neither_a_mixture_nor_a_gap")
class LeavesAGap(MemoryBackend):
    def put(self, key, data):
        self.remove(key)
        time.sleep(0.001)
        return super().put(key, data)


@breaks("test_putting_again_shows_neither_a_mixture_nor_a_gap")
class WritesInPlace(MemoryBackend):
    def put(self, key, data):
        half = data.nbytes // 2
        if data.nbytes == 1 << 20 and self.contains(key):
            super().put(key, memoryview(bytes(data[:half]) + self._objects[key][half:]))
            time.sleep(0.001)
        return super().put(key, data)


@breaks("test_keys_that_differ_in_one_bit_do_not_meet")
class DropsABit(MemoryBackend):
    def put(self, key, data):
        return super().put(key[:-1] + bytes([key[-1] & 0xFE]), data)

    def get_into(self, key, out):
        return super().get_into(key[:-1] + bytes([key[-1] & 0xFE]), out)

    def contains(self, key):
        return super().contains(key[:-1] + bytes([key[-1] & 0xFE]))

    def remove(self, key):
        return super().remove(key[:-1] + bytes([key[-1] & 0xFE]))


class CountsRight(MemoryBackend):
    def count_leading(self, keys):
        present = [MemoryBackend.contains(self, key) for key in keys]
        return (*present, False).index(False)


@breaks("test_contains_what_was_put_and_nothing_else")
class ContainsEverything(CountsRight):
    def contains(self, key):
        return super().contains(key) or True


@breaks("test_contains_what_was_put_and_nothing_else")
class ContainsNothing(CountsRight):
    def contains(self, key):
        return super().contains(key) and False


@breaks("test_count_leading_stops_at_the_first_gap")
class CountsBeyondTheGap(MemoryBackend):
    def count_leading(self, keys):
        return sum(map(self.contains, keys))


@breaks("test_count_leading_of_no_keys_is_zero")
class NeedsAKeyToCount(CountsRight):
    def count_leading(self, keys):
        return super().count_leading(keys) if keys[0] else 0


@breaks("test_remove_if_promised")
class RemovesNothing(MemoryBackend):
    def remove(self, key):
        return self.contains(key)


@breaks("test_remove_if_promised")
class SaysItRemovedWhatWasNotThere(MemoryBackend):
    def remove(self, key):
        return super().remove(key) or True


@breaks("test_remove_if_promised")
class RemovesWithoutAPromise(MemoryBackend):
    capabilities = Capabilities(removal=False)


@breaks("test_objects_outlive_their_writer_if_promised")
class PromisesToPersist(MemoryBackend):
    capabilities = Capabilities(persistent=True)


@breaks("test_objects_outlive_their_writer_if_promised")
class PersistsWithoutAPromise(MemoryBackend):
    capabilities = Capabilities(shared=True)
    everything: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self):
        super().__init__()
        self._objects = self.everything


@breaks("test_two_at_once_share_if_promised")
class PromisesToShare(MemoryBackend):
    capabilities = Capabilities(shared=True)


@breaks("test_two_at_once_share_if_promised")
class SharesWithoutAPromise(PersistsWithoutAPromise):
    capabilities = Capabilities(persistent=True)
    everything: ClassVar[dict[bytes, bytes]] = {}


@breaks("test_closed_means_closed")
class AnswersWhenClosed(MemoryBackend):
    def contains(self, key):
        return bool(self._objects) and super().contains(key)


@breaks("test_closed_means_closed")
class FailsOddlyWhenClosed(MemoryBackend):
    def put(self, key, data):
        self._objects.get(key)  # an error of Python's once it is None
        return super().put(key, data)


@breaks("test_closing_twice_is_harmless")
class ClosesOnce(MemoryBackend):
    def close(self):
        if self._objects is None:
            raise BackendClosed("closed already")
        super().close()


@breaks("test_threads_do_not_get_in_each_others_way")
class KeepsItsPlaceInAnAttribute(MemoryBackend):
    def put(self, key, data):
        self._data = bytes(data)
        time.sleep(0.0001)
        return super().put(key, memoryview(self._data))


RULES = {name for name in vars(BackendSuite) if name.startswith("test_")}
SUITE = """
import pytest
from test_backend_suite import BROKEN, MemoryBackend
from lmcache.testing import BackendSuite

def suite(cls):
    class Test(BackendSuite):
        @pytest.fixture
        def open_backend(self):
            return cls
    return Test

for cls in (MemoryBackend, *BROKEN):
    globals()["Test" + cls.__name__] = suite(cls)

class TestReplacesARule(TestMemoryBackend):
    def test_put_copies(self):
        pass

class TestExcusesARule(TestKeepsTheBuffer):
    @pytest.mark.xfail(reason="keeps the buffer", strict=True)
    def test_put_copies(self, backend, keys):
        super().test_put_copies(backend, keys)

class TestExcusesARuleWithoutAReason(TestKeepsTheBuffer):
    @pytest.mark.xfail
    def test_put_copies(self, backend, keys):
        super().test_put_copies(backend, keys)
"""


def failures(report: Path) -> dict[str, set[str]]:
    """The rules that each class of the report failed."""
    failed: dict[str, set[str]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - our own child wrote it
        rules = failed.setdefault(case.attrib["classname"].rpartition(".Test")[2], set())
        if case.find("failure") is not None or case.find("error") is not None:
            rules.add(case.attrib["name"].partition("[")[0])
    return failed


def test_a_broken_backend_fails_its_rule_and_no_other(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess("-q", "-W", "error", "--junitxml", "report.xml")
    whole = {"test_the_suite_is_whole"}
    assert failures(pytester.path / "report.xml") == {
        "MemoryBackend": set(),
        "ReplacesARule": whole,
        "ExcusesARule": set(),
        "ExcusesARuleWithoutAReason": whole,
        **{cls.__name__: {rule} for cls, rule in BROKEN.items()},
    }
    result.stdout.fnmatch_lines(["*an object vanished while it was put again*"])
    result.stdout.fnmatch_lines(
        ["*test_put_copies is replaced; mark it xfail(reason=...) instead*"]
    )


def test_every_rule_is_failed_by_some_backend():
    assert {*BROKEN.values(), "test_the_suite_is_whole"} == RULES


def test_every_rule_says_what_it_fails_on(pytester):
    """Assertions are rewritten abroad, so that a failure shows both sides."""
    pytester.makepyfile(
        """
        import pytest
        from lmcache.backends.memory import MemoryBackend
        from lmcache.testing import BackendSuite

        class Deaf(MemoryBackend):
            def put(self, key, data):
                return False

        class TestDeaf(BackendSuite):
            @pytest.fixture
            def open_backend(self):
                return Deaf
        """
    )
    result = pytester.runpytest_subprocess("-q", "-k", "test_what_is_put_is_got and 4096")
    result.stdout.fnmatch_lines(["*assert False is True*", "*where False = put(*"])


def test_the_suite_leaves_nothing_behind(pytester):
    pytester.makepyfile(
        """
        import pytest
        from lmcache.backends.disk import DiskBackend
        from lmcache.testing import BackendSuite

        class TestDisk(BackendSuite):
            @pytest.fixture
            def open_backend(self):
                return lambda: DiskBackend("cache")
        """
    )
    result = pytester.runpytest_subprocess("-q", "-W", "error")
    result.assert_outcomes(passed=len(RULES) + 3 + 4)
    left = [path.name for path in (pytester.path / "cache").rglob("*") if path.is_file()]
    assert left == ["usage"]


def test_a_suite_without_a_backend_says_what_is_missing(pytester):
    pytester.makepyfile(
        """
        from lmcache.testing import BackendSuite

        class TestNothing(BackendSuite):
            pass
        """
    )
    result = pytester.runpytest_subprocess("-q")
    result.stdout.fnmatch_lines(["*NotImplementedError: override the open_backend fixture"])


CHECK = ("-q", "-p", "lmcache.testing.plugin", "--pyargs", "lmcache.testing.check_url")


@pytest.mark.parametrize("url", ["memory://?max_size=50MB", "file://{0}/cache?max_size=50MB"])
def test_a_url_is_checked(pytester, url):
    given = url.format(pytester.path)
    result = pytester.runpytest_subprocess(*CHECK, "-W", "error", "--lmcache-backend", given)
    result.assert_outcomes(passed=len(RULES) + 3 + 4)


def test_a_url_of_no_backend_names_the_known_ones(pytester):
    result = pytester.runpytest_subprocess(*CHECK, "-x", "--lmcache-backend", "gopher://hole")
    result.stdout.fnmatch_lines(["*ConfigError: *'gopher'*file*memory*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_check_without_a_url_fails(pytester):
    result = pytester.runpytest_subprocess(*CHECK, "-x")
    result.stdout.fnmatch_lines(["*needs -p lmcache.testing.plugin --lmcache-backend URL*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
