"""Processes that are started, looked at and ended together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SHARED = re.compile(r"/dev/shm/(?:sgl_|sglang_|psm_)\S*")
"""What SGLang does not remove when it is killed. What we leave behind is a test's to see."""


class Group:
    """A command and all that it starts, in a process group of their own."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> None:
        with log.open("ab") as sink:
            self._leader = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def lives(self) -> bool:
        """Whether the process that was started is still there."""
        return self._leader.poll() is None

    def members(self) -> list[int]:
        """The processes that run."""
        return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if self._has(entry)]

    def shared(self) -> set[Path]:
        """Files of SGLang's in shared memory that a member has mapped."""
        found: set[Path] = set()
        for pid in self.members():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{pid}/maps").read_text()
                found.update(map(Path, SHARED.findall(maps)))
        return found

    def terminate(self, patience_s: float) -> list[int]:
        """Ask the first process to end; who is left after a while?"""
        self._leader.terminate()
        self._wait(lambda: not self.members(), patience_s)
        return self.members()

    def kill(self) -> None:
        """End all at once."""
        while self.members():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._leader.pid, signal.SIGKILL)
            time.sleep(0.01)
        self._leader.wait()

    def _wait(self, condition: Callable[[], bool], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not condition() and time.monotonic() < deadline:
            self._leader.poll()
            time.sleep(0.05)

    def _has(self, entry: Path) -> bool:
        try:
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            return False
        return int(group) == self._leader.pid and state not in "ZX"
