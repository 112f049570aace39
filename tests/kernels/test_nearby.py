"""Memory lies next to the thread that touches it first, so that thread stays where it should."""

from __future__ import annotations

import os
import threading

import pytest

from lmcache.core.kernels.nearby import stay_near, stay_on_node

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity"
)


def where(stay):
    """The processors of a thread that does it."""
    seen = []

    def thread():
        stay()
        seen.append(os.sched_getaffinity(0))

    running = threading.Thread(target=thread)
    running.start()
    running.join()
    return seen[0]


@pytest.mark.parametrize("said", ["{first}", "{first}-{first},4000-4001", "nonsense", "4000", None])
def test_a_thread_stays_near_its_device(tmp_path, said):
    """And where it was if the system does not say, or names processors we may not use."""
    allowed = os.sched_getaffinity(0)
    first = min(allowed)
    if said:
        folder = tmp_path / "0000:0a:00.0"
        folder.mkdir()
        (folder / "local_cpulist").write_text(said.format(first=first) + "\n")
    found = where(lambda: stay_near("0000:0A:00.0", tmp_path))
    assert found == ({first} if said and "{first}" in said else allowed)


@pytest.fixture
def one_processor():
    """As engines do, the main thread is kept on one; which, and all others there are."""
    allowed = os.sched_getaffinity(0)
    first = min(allowed)
    os.sched_setaffinity(0, {first})
    yield first, allowed - {first}
    os.sched_setaffinity(0, allowed)


def test_a_thread_may_use_all_of_its_node(one_processor):
    """On a machine with one node this is every processor of it."""
    first, others = one_processor
    found = where(stay_on_node)
    assert first in found
    nodes = [name for name in os.listdir("/sys/devices/system/node") if name[4:].isdigit()]
    if len(nodes) == 1:
        assert found == {first} | others


@pytest.mark.parametrize(
    ("nodes", "near"),
    [
        (["{first}", "{others}"], False),
        (["{others}", "{first},4000"], False),
        (["{first},{others}", ""], True),
        (["", "{first}", "{first},{others}"], True),
        (["{others}"], True),
        (["nonsense"], None),
        ([], True),
    ],
)
def test_no_other_node_is_used(one_processor, tmp_path, nodes, near):
    """Memory without processors is a node as well; where nothing is said, any will do."""
    first, others = one_processor
    if not others:
        pytest.skip("needs two processors")
    for number, text in enumerate(nodes):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        listed = text.format(first=first, others=",".join(map(str, others)))
        (folder / "cpulist").write_text(listed + "\n")
    expected = {first} | others if near else {first}
    assert where(lambda: stay_on_node(tmp_path)) == expected
