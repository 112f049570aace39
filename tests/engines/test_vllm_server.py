"""Real vLLM and a real server in processes of their own: one cache that outlives its engines."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

pytestmark = pytest.mark.engine

LINE = (
    "The keeper of lighthouse number {} wrote down the wind, the tide and every ship that passed. "
)
READY_S = 20


def story(number, tokens):
    """Distinct text of about `tokens` tokens; the same for the same arguments."""
    rng = random.Random(number)
    lines = [f"Log {number}. "]
    while sum(map(len, lines)) < tokens * 4:
        lines.append(LINE.format(rng.randrange(1000)))
    return "".join(lines) + "In short, the keeper was"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """`lmcache server`, at the same ports however often it is started."""

    def __init__(self, log, *options):
        self.port, self.http = free_port(), free_port()
        self._log = log
        self._options = options
        self._process = None

    def start(self):
        ports = ["--port", str(self.port), "--http-port", str(self.http)]
        with self._log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmcache", "server", *ports, *self._options],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LMCACHE_LOG_LEVEL": "INFO"},
            )
        deadline = time.monotonic() + READY_S
        while not self._answers():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return self

    def _answers(self):
        try:
            return self.get("readyz")
        except OSError:
            return None

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/{path}", timeout=5) as page:
            return json.loads(page.read())

    def log(self):
        return self._log.read_text()

    def send(self, number):
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def stop(self):
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(20)
        return self._process.returncode

    def transfer(self, **options):
        """How an engine is told to use it."""
        keys = {f"lmcache.mp.{key}": value for key, value in options.items()}
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"lmcache.mp.port": self.port, **keys},
        }

    def wait(self, condition, timeout_s=10.0):
        """Until `condition(status)` holds."""
        deadline = time.monotonic() + timeout_s
        while not condition(status := self.get("status")):
            assert time.monotonic() < deadline, status
            time.sleep(0.05)
        return status

    def wait_idle(self, timeout_s=10.0):
        """Nothing is leased, reserved or in the air."""

        def is_idle(status):
            held = [
                engine["steps_in_the_air"] + engine["reserved_slots"] + engine["lookups_waiting"]
                for engine in status["engines"]
            ]
            return status["l1"]["leases"] == 0 and not any(held) and not status["leaving"]

        return self.wait(is_idle, timeout_s)


@pytest.fixture
def start_server(tmp_path):
    """Starts servers and stops them in the end."""
    started = []

    def start(*options):
        server = Server(tmp_path / f"server-{len(started)}.log", *options)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()


@contextmanager
def both(first, second):
    with first, second:
        yield first, second


def ask(engine, prompt, **options):
    [answer] = engine.generate([prompt], max_tokens=12, temperature=0, **options)
    return answer


def test_a_second_engine_loads_what_the_first_computed(start_engine, start_server):
    server = start_server("--l1-size-gb", "1", "--chunk-size", "256")
    transfer = server.transfer()
    prompt = story(1, 1500)
    with start_engine(kv_transfer_config=transfer, one_process=True) as engine:
        cold = ask(engine, prompt)
        warm = ask(engine, prompt)
        assert warm.token_ids == cold.token_ids
        assert warm.num_cached_tokens > 1000
        assert cold.num_cached_tokens == 0
    server.wait(lambda status: not status["engines"])
    with start_engine(kv_transfer_config=transfer) as engine:
        other = ask(engine, prompt)
        assert other.token_ids == cold.token_ids
        assert other.num_cached_tokens == warm.num_cached_tokens
        status = server.wait_idle()
        assert status["l1"]["chunks"] > 0
    server.wait(lambda status: not status["engines"] and not status["leaving"])
    assert server.stop() == 0
