"""Whatever is done with a backend, in whatever order, it shows nothing but what was put."""

from __future__ import annotations

import hashlib
from itertools import count
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from lmcache.testing.backend_suite.tools import blank

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.keys import ChunkKey
    from lmcache.testing.backend_suite.tools import Keys, OpenClient

NAMES = 3
SIZES = (0, 1, 300, 70_000)
SETTINGS = settings(
    # a slow store must end in seconds, so what fails is shown as it is; and it must fail again
    max_examples=30,
    stateful_step_count=20,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def content(name: int, size: int, version: int) -> bytes:
    """An object that is put under no other name, nor in any other version."""
    return hashlib.shake_128(bytes([name, version])).digest(size)


_names = st.integers(0, NAMES - 1)
_acts = st.one_of(
    st.tuples(st.just("put"), _names, st.sampled_from(SIZES), st.booleans()),
    st.tuples(st.just("remove"), _names),
    st.tuples(st.just("replace"), _names, st.sampled_from(SIZES)),
    st.tuples(st.just("get"), st.sampled_from((300, max(SIZES)))),
    st.tuples(st.sampled_from(("contains", "count_leading", "reopen"))),
)


class BackendStateMachine(RuleBasedStateMachine):
    """A backend beside all that it may show: for each name, the objects that may be there.

    An object may be lost at any time. But once a name was seen without one, there is none until one
    is put; and once it was seen with one, it has no other until another is put.
    """

    def __init__(self, open_client: OpenClient, keys: Keys) -> None:
        super().__init__()
        self._open_client = open_client
        self._client = open_client()
        self._keys = [keys.unused() for _ in range(NAMES)]
        self._may_be: list[set[bytes]] = [set() for _ in range(NAMES)]
        self._put_last: list[bytes] = [b""] * NAMES
        self._versions = count()

    def teardown(self) -> None:
        self._client.close()

    # one rule for all: of several, hypothesis leaves out some in most of its histories
    @rule(act=_acts)
    def step(self, act: tuple[Any, ...]) -> None:
        name, *details = act
        getattr(self, f"_{name}")(*details)

    def _put(self, name: int, size: int, again: bool) -> None:
        if not again:
            self._put_last[name] = content(name, size, next(self._versions))
        data = self._put_last[name]
        stored = self._client.put(self._keys[name], memoryview(data))
        assert stored in (True, False)
        if stored:
            self._may_be[name].add(data)

    def _remove(self, name: int) -> None:
        if self._client.capabilities.removal:
            self._gone(name, self._client.remove)

    def _gone(self, name: int, remove: Callable[[ChunkKey], bool]) -> None:
        self._seen(name, there=remove(self._keys[name]))
        self._may_be[name].clear()

    def _replace(self, name: int, size: int) -> None:
        """What is done about an object that was damaged."""
        if self._client.capabilities.removal:
            self._gone(name, self._client.discard_damaged)
        self._put(name, size, again=False)

    def _get(self, room: int) -> None:
        for name in range(NAMES):
            out = blank(room)
            length = self._client.get_into(self._keys[name], out)
            rest = length or 0
            assert out[rest:] == blank(room - rest)
            if length is None:
                self._may_be[name] = {data for data in self._may_be[name] if len(data) > room}
            else:
                self._seen(name, there=True)
                assert bytes(out[:rest]) in self._may_be[name], "not the bytes that were put"
                self._may_be[name] = {bytes(out[:rest])}

    def _contains(self) -> None:
        for name in range(NAMES):
            self._seen(name, there=self._client.contains(self._keys[name]))

    def _count_leading(self) -> None:
        there = self._client.count_leading(self._keys)
        assert 0 <= there <= NAMES
        for name in range(there):
            self._seen(name, there=True)

    def _reopen(self) -> None:
        self._client.close()
        self._client = self._open_client()

    def _seen(self, name: int, *, there: bool) -> None:
        if there:
            assert self._may_be[name], "an object that was never put, or had been seen to be gone"
        else:
            self._may_be[name].clear()


class HistoryRules:
    """The rule of all that no other rule thinks of."""

    def test_any_history_shows_only_what_was_put(self, open_client: OpenClient, keys: Keys) -> None:
        class Fresh(BackendStateMachine):
            def __init__(self) -> None:
                super().__init__(open_client, keys)

        run_state_machine_as_test(Fresh, settings=SETTINGS)
