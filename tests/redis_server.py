"""A real redis-server, or valkey-server, on a port of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from ports import free_port

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
needs_server = pytest.mark.skipif(
    PROGRAM is None, reason="neither redis-server nor valkey-server is installed"
)


class RedisServer:
    """Runs until it is killed; what it stored is gone then, unless it is told to keep it."""

    def __init__(self, directory, *options: str) -> None:
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        for attempt in range(5):  # somebody else may have been given the port meanwhile
            self.port = free_port()
            try:
                self.start()
            except AssertionError:
                self.kill()
                if attempt == 4:
                    raise
            else:
                return

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [PROGRAM, "--bind", "127.0.0.1", "--port", str(self.port), "--save", ""]
        command += ["--dir", str(self._directory), "--daemonize", "no", *self._options]
        log_file = Path(self._directory, f"{self.port}.log")
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                ours = f"process_id:{self._process.pid}\r\n".encode()
                answer = self.say("INFO", "server")
                assert ours in answer or answer.startswith(b"-NOAUTH"), "the port is another's"
            except OSError:
                assert self._process.poll() is None, log_file.read_text()
                assert time.monotonic() < deadline, log_file.read_text()
                time.sleep(0.02)
            else:
                return

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()

    def say(self, *words: object) -> bytes:
        """The server's answer to a command, as it comes over the wire."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
            parts = [str(word).encode() for word in words]
            frame = b"*%d\r\n" % len(parts)
            frame += b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
            sock.sendall(frame)
            return sock.recv(1 << 16)
