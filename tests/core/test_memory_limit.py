from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmcache.core.memory_limit import GIB, MemoryLimit, clamp_budget, memory_limit

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED_V1 = "9223372036854771712"


def machine(root: Path, cgroup: str | None, files: dict[str, object]) -> Path:
    """A file system with that `/proc/self/cgroup` and those files below `/sys/fs/cgroup`."""
    if cgroup is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "limit", "source"),
    [
        pytest.param("0::/a/b\n", {"a/b/memory.max": 1000}, 1000, "a/b/memory.max", id="v2"),
        pytest.param(
            "0::/a/b\n",
            {"memory.max": "max", "a/memory.max": 500, "a/b/memory.max": "max"},
            500,
            "a/memory.max",
            id="v2-parent",
        ),
        pytest.param("0::/\n", {"memory.max": 700}, 700, "memory.max", id="v2-container"),
        pytest.param(
            "0::/../../other\n",
            {"memory.max": 800, "other/memory.max": 1},
            800,
            "memory.max",
            id="v2-outside-the-namespace",
        ),
        pytest.param(
            "2:cpu,cpuacct:/a\n1:hugetlb,memory:/a/b\n0::/a\n",
            {"memory/a/b/memory.limit_in_bytes": 300, "memory/memory.limit_in_bytes": 400},
            300,
            "memory/a/b/memory.limit_in_bytes",
            id="v1",
        ),
        pytest.param(
            "4:memory:/docker/0123\n",
            {"memory/memory.limit_in_bytes": 600},
            600,
            "memory/memory.limit_in_bytes",
            id="v1-path-of-the-host",
        ),
    ],
)
def test_the_tightest_cgroup_counts(
    tmp_path: Path, cgroup: str, files: dict[str, object], limit: int, source: str
) -> None:
    found = memory_limit(machine(tmp_path, cgroup, files))
    assert found == MemoryLimit(limit, str(tmp_path / "sys/fs/cgroup" / source))


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        pytest.param(None, {}, id="no-proc"),
        pytest.param("0::/a\n", {}, id="no-files"),
        pytest.param("0::/a\n", {"a/memory.max": "max"}, id="v2-unlimited"),
        pytest.param(
            "4:memory:/\n", {"memory/memory.limit_in_bytes": UNLIMITED_V1}, id="v1-unlimited"
        ),
    ],
)
def test_without_a_limit_it_is_physical_memory(
    tmp_path: Path, cgroup: str | None, files: dict[str, object]
) -> None:
    found = memory_limit(machine(tmp_path, cgroup, files))
    assert found == MemoryLimit(PHYSICAL, "physical memory")


def test_this_machine_has_a_limit() -> None:
    assert 0 < memory_limit().bytes <= PHYSICAL


def test_a_budget_that_fits_is_left_alone(warnings: list[str]) -> None:
    assert clamp_budget(8 * GIB, MemoryLimit(10 * GIB, "physical memory")) == 8 * GIB
    assert warnings == []


def test_a_budget_that_does_not_fit_is_clamped_and_says_so(warnings: list[str]) -> None:
    limit = MemoryLimit(10 * GIB, "/sys/fs/cgroup/memory.max")
    assert clamp_budget(50 * GIB, limit) == 8 * GIB
    assert len(warnings) == 1
    for part in ("8.00 GiB", "50.00 GiB", "10.00 GiB", "/sys/fs/cgroup/memory.max"):
        assert part in warnings[0]
