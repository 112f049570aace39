"""Who finds fault: violations of the contract, and the calls of one rank.

A violation is kept until the executor looks, as a connector may catch whatever is raised in it.
"""

from __future__ import annotations

import threading
import time


class Violation(AssertionError):
    """A rule of the contract that a connector broke."""

    def __init__(self, rule, text):
        super().__init__(f"{rule}: {text}")
        self.rule = rule


class ExecutorDied(RuntimeError):
    """A connector raised where nothing catches it."""


class BatchFailed(RuntimeError):
    """A connector raised in the forward step: the batch's requests fail, the loop goes on."""


class Judge:
    def __init__(self):
        self._found = []
        self._lock = threading.Lock()

    def expect(self, ok, rule, text):
        if not ok:
            with self._lock:
                self._found.append(Violation(rule, text))

    def settle(self):
        """Raise the first violation there was."""
        with self._lock:
            found, self._found = self._found, []
        if found:
            raise found[0]


IN_FORWARD = {"hook", "callable", "save"}
NONE = {"register", "update", "bind", "load", "hook", "callable", "save", "cancel_load", "reset"}


class Watch:
    """Calls what a connector offers, and looks at how long it takes and what it answers."""

    def __init__(self, judge, rank, limit_s):
        self.judge, self.rank, self.limit_s = judge, rank, limit_s

    def __call__(self, name, function, *args):
        began = time.monotonic()
        try:
            answer = function(*args)
        except Exception as error:
            kind = BatchFailed if name in IN_FORWARD else ExecutorDied
            raise kind(f"rank {self.rank}, {name}: {error!r}") from error
        took = time.monotonic() - began
        self.judge.expect(took < self.limit_s, "blocked", f"{name} took {took:.2f} s")
        if name in NONE:
            self.judge.expect(answer is None, "answer", f"{name} returned {answer!r}")
        return answer
