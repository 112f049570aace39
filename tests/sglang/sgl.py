"""A real SGLang server on a CPU, for tests.

    with Sglang("0.5.23", log, model=folder, lmcache=False) as server:
        answer = server.generate([1, 2, 3])

A server is up in 15 to 30 s, most of which is importing, and four times that beside other work; it
has ended 5 s after it was told to.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from group import Group
from launch import Launch
from ports import free_port

READY_S = 240.0
ENDED_S = 30.0
"""SGLang looks every 5 s whether it was told to end."""
FLUSHED_S = 10.0
ANSWERED_S = 120.0
LOG_TAIL = 60
LINE = 500
"""Of a line, what is shown; SGLang tells all its options in one."""


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    output_ids: list[int]
    cached_tokens: int
    """Tokens of the prompt that were not computed."""
    details: dict[str, Any] | None
    """Where they came from, as far as the version tells."""
    finish_reason: str
    """SGLang's `length`, `stop` or `abort`."""


class Sglang:
    """A server in a process group of its own. Calls may come from any thread and overlap."""

    def __init__(self, version: str, log: Path, **options: Any) -> None:
        """`options` are those of `Launch`."""
        launch = Launch(version=version, **options)
        self.version = version
        self.port = free_port()
        self._log = log
        # SGLang leaves its sockets there
        self._temporary = log.with_suffix(".tmp")
        self._temporary.mkdir()
        self._shared: set[Path] = set()
        start = time.monotonic()
        environment = launch.environment(self._temporary)
        self._group = Group(launch.command(self.port), log, environment)
        try:
            self._wait_ready(start + READY_S)
        except BaseException:
            self.kill()
            raise
        self.startup_s = time.monotonic() - start

    def __enter__(self) -> Sglang:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def generate(self, input_ids: Sequence[int], max_new_tokens: int = 8, **more: Any) -> Answer:
        """Greedy, and never short; `more` are fields of SGLang's request, as `rid`."""
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": list(input_ids), "sampling_params": sampling, **more}
        said = json.loads(self.post("generate", body))
        about = said["meta_info"]
        return Answer(
            said["output_ids"],
            about.get("cached_tokens", 0),  # none if it was cancelled before it ran
            about.get("cached_tokens_details"),
            about["finish_reason"]["type"],
        )

    def many(self, prompts: Sequence[Sequence[int]], at_once: int = 6) -> list[Answer]:
        """The answers to prompts of which some run together, in the prompts' order."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self.generate, prompts))

    def flush(self) -> None:
        """Empty SGLang's own cache, and nothing else."""
        deadline = time.monotonic() + FLUSHED_S
        # it refuses while the last request, which has been answered, is not put away
        while (said := self._say("POST", "flush_cache"))[0] == http.HTTPStatus.BAD_REQUEST:
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        assert said[0] == http.HTTPStatus.OK, said

    def abort(self, rid: str) -> None:
        """Cancel a running request; one that is unknown is ignored."""
        self.post("abort_request", {"rid": rid})

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """What a path of the server's answers."""
        status, said = self._say("POST", path, body)
        assert status == http.HTTPStatus.OK, (status, said)
        return said

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def tail(self) -> str:
        """The end of the log, for people."""
        lines = [line[:LINE] for line in self.log().splitlines()[-LOG_TAIL:]]
        return "\n".join([f"{self._log} ends with:", *lines])

    def stop(self) -> None:
        """Ask it to end; one that does not is killed, and fails the test."""
        left = self._group.terminate(ENDED_S)
        self.kill()
        assert not left, f"SIGTERM left {len(left)} processes\n{self.tail()}"

    def kill(self) -> None:
        """End all its processes at once, and remove what they shared."""
        self._shared |= self._group.shared()
        self._group.kill()
        for path in self._shared:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _wait_ready(self, deadline: float) -> None:
        while not self._is_ready():
            assert self._group.lives(), self.tail()
            assert time.monotonic() < deadline, self.tail()
            self._shared |= self._group.shared()  # it may die before it is ready
            time.sleep(0.2)
        self._shared |= self._group.shared()

    def _is_ready(self) -> bool:
        try:
            return self._say("GET", "health")[0] == http.HTTPStatus.OK
        except OSError:  # it does not listen yet
            return False

    def _say(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWERED_S)
        with contextlib.closing(connection):
            headers = {"content-type": "application/json"}
            connection.request(method, f"/{path}", json.dumps(body or {}), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
