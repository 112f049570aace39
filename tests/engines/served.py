"""`lmcache server` in a process of its own, for tests with a real vLLM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

from ports import free_port

READY_S = 20
ATTACHED_S = 5.0
"""In which an engine must be back with a server that is back."""


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

    def restart_with(self, *options):
        """Start again, with other options."""
        self._options = options
        return self.start()

    def _answers(self):
        try:
            return self.get("readyz")
        except OSError:
            return None

    def get(self, path):
        return json.loads(self._page(path))

    def _page(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/{path}", timeout=5) as page:
            return page.read()

    def sum(self, counter):
        """A counter's value over all its labels."""
        pattern = rf"^lmcache_{counter}_total\{{[^}}]*\}} (\S+)$"
        found = re.findall(pattern, self._page("metrics").decode(), re.MULTILINE)
        return sum(map(float, found))

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
            time.sleep(0.005)
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


def ask(engine, prompt, **options):
    [answer] = engine.generate([prompt], max_tokens=12, temperature=0, **options)
    return answer
