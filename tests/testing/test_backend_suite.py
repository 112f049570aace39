"""The suite is worth shipping only if a backend that breaks a rule fails that rule and no other."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import broken_folders  # noqa: F401 - adds to those that are broken
import pytest
from broken_backends import BROKEN

from lmcache.backends.disk import DiskBackend
from lmcache.testing import BackendSuite

pytest_plugins = ["pytester"]

RULES = {name for name in dir(BackendSuite) if name.startswith("test_")}
CASES = len(RULES) + 3 + 5 + 2
"""Rules that are checked more than once count as often: sizes, calls, and moments of a kill."""
HISTORY = "test_any_history_shows_only_what_was_put"
SUITE = """
import pytest
from broken_backends import BROKEN, Common
from broken_folders import FOLDERS, Folder
from lmcache.backends.memory import MemoryBackend
from lmcache.testing import BackendSuite

def suite(cls):
    class Test(BackendSuite):
        deadline_s = getattr(cls, "deadline_s", 60)

        @pytest.fixture
        def url(self, tmp_path):
            return f"{cls.__name__.lower()}://{tmp_path}" if cls in FOLDERS else None

        @pytest.fixture
        def open_backend(self, url):
            return (lambda: cls(url)) if url else cls

    return Test

for cls in (MemoryBackend, Common, Folder, *BROKEN):
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


@pytest.mark.slow
def test_a_broken_backend_fails_its_rule_and_no_other(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    info = pytester.mkdir("folders-1.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: folders\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lmcache]\nfolders = broken_folders\n")
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess("-q", "-W", "error", "--junitxml", "report.xml")
    whole = {"test_the_suite_is_whole"}
    failed = failures(pytester.path / "report.xml")
    for cls, rules in BROKEN.items():
        if HISTORY not in rules:  # which sees most of what the other rules see
            failed[cls.__name__].discard(HISTORY)
    assert failed == {
        "MemoryBackend": set(),
        "Common": set(),
        "Folder": set(),
        "ReplacesARule": whole,
        "ExcusesARule": set(),
        "ExcusesARuleWithoutAReason": whole,
        **{cls.__name__: rules for cls, rules in BROKEN.items()},
    }
    result.stdout.fnmatch_lines(["*an object vanished while it was put again*"])
    result.stdout.fnmatch_lines(
        ["*test_put_copies is replaced; mark it xfail(reason=...) instead*"]
    )


def test_every_rule_is_failed_by_some_backend():
    assert set.union(*BROKEN.values()) | {"test_the_suite_is_whole"} == RULES


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
        import os
        import pytest
        from lmcache.testing import BackendSuite

        class TestDisk(BackendSuite):
            @pytest.fixture
            def url(self):
                return f"file://{os.getcwd()}/cache"
        """
    )
    result = pytester.runpytest_subprocess("-q", "-W", "error")
    result.assert_outcomes(passed=CASES)
    DiskBackend(pytester.path / "cache").close()  # lets go of files that hold nothing any more
    left = {path.name for path in (pytester.path / "cache").iterdir()}
    assert left == {"lock", "journal", os.readlink(pytester.path / "cache" / "journal")}


def test_a_suite_without_a_backend_says_what_is_missing(pytester):
    pytester.makepyfile(
        """
        from lmcache.testing import BackendSuite

        class TestNothing(BackendSuite):
            pass
        """
    )
    result = pytester.runpytest_subprocess("-q")
    result.stdout.fnmatch_lines(["*NotImplementedError: override the fixture url, or open_backend"])


def test_rules_of_processes_need_a_url_where_something_is_promised(pytester):
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
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(passed=CASES - 5, skipped=2 + 3)
    result.stdout.fnmatch_lines(["*another process needs a URL: override the fixture url"])


@pytest.mark.parametrize(
    ("hanging", "rule"),
    [
        ("opening", "test_what_is_put_is_got"),
        ("contains", "test_contains_what_was_put_and_nothing_else"),
        ("put", "test_threads_do_not_get_in_each_others_way"),
        ("get_into", "test_any_history_shows_only_what_was_put"),
        ("close", "test_closing_twice_is_harmless"),
    ],
)
def test_a_call_that_hangs_is_named(pytester, hanging, rule):
    method = "__init__" if hanging == "opening" else hanging
    pytester.makepyfile(
        f"""
        import threading
        import pytest
        from lmcache.backends.memory import MemoryBackend
        from lmcache.testing import BackendSuite

        class Hanging(MemoryBackend):
            def {method}(self, *args):
                threading.Event().wait()

        class TestHanging(BackendSuite):
            deadline_s = 0.5

            @pytest.fixture
            def open_backend(self):
                return Hanging
        """
    )
    result = pytester.runpytest_subprocess("-x", "-k", rule, timeout=60)
    result.stdout.fnmatch_lines([f"*Hung: {hanging} has not returned after 0.5 s"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


CHECK = ("-q", "-p", "lmcache.testing.plugin", "--pyargs", "lmcache.testing.check_url")


@pytest.mark.parametrize("url", ["memory://?max_size=50MB", "file://{0}/cache?max_size=50MB"])
def test_a_url_is_checked(pytester, url):
    given = url.format(pytester.path)
    result = pytester.runpytest_subprocess(*CHECK, "-W", "error", "--lmcache-backend", given)
    result.assert_outcomes(passed=CASES)


def test_a_url_of_no_backend_names_the_known_ones(pytester):
    result = pytester.runpytest_subprocess(*CHECK, "-x", "--lmcache-backend", "gopher://hole")
    result.stdout.fnmatch_lines(["*ConfigError: *'gopher'*file*memory*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_check_without_a_url_fails(pytester):
    result = pytester.runpytest_subprocess(*CHECK, "-x")
    result.stdout.fnmatch_lines(["*needs -p lmcache.testing.plugin --lmcache-backend URL*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
