from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmcache.backends.head import Head
from lmcache.core.errors import BackendClosed


class Claimed:
    """Segments, and how they were left."""

    def __init__(self):
        self.ends, self.fails = {}, set()

    def claim(self, size):
        number = len(self.ends)
        self.ends[number] = None

        def finish(end):
            self.ends[number] = end
            if number in self.fails:
                raise OSError(5, "broken")

        return SimpleNamespace(
            number=number, size=size, end=0, writers=0, is_intact=True, finish=finish
        )


@pytest.fixture
def claimed():
    return Claimed()


@pytest.fixture
def head(claimed):
    return Head(claimed.claim, 10)


def test_a_segment_is_left_when_it_is_full_and_nobody_writes_to_it(head, claimed):
    rooms = [head.take(4), head.take(4), head.take(4)]
    assert [(room.segment.number, room.offset) for room in rooms] == [(0, 0), (0, 4), (1, 0)]
    head.give_back(rooms[0])
    assert claimed.ends == {0: None, 1: None}
    head.give_back(rooms[1])
    assert claimed.ends == {0: 8, 1: None}
    head.give_back(rooms[2])
    head.close()
    assert claimed.ends == {0: 8, 1: 4}
    with pytest.raises(BackendClosed):
        head.take(4)


def test_one_that_is_quite_full_is_left_though_nothing_follows(head, claimed):
    head.give_back(head.take(10))
    assert claimed.ends == {0: 10}


def test_an_error_in_one_does_not_keep_others(head, claimed):
    claimed.fails = {0}
    head.give_back(head.take(4))
    room = head.take(10)  # the first is left, and nobody has come for it
    with pytest.raises(OSError, match="broken"):
        head.give_back(room)
    assert claimed.ends == {0: 4, 1: 10}


def test_an_object_of_its_own_leaves_the_segment_that_is_being_filled(head, claimed):
    small, large = head.take(4), head.take(30)
    assert (large.segment.number, large.segment.size) == (1, 30)
    head.give_back(large)
    assert head.take(4).segment is small.segment
    assert claimed.ends == {0: None, 1: 30}
