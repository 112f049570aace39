"""A real Mooncake Store: a master, and a process that contributes memory to its pool."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port

POOL_BYTES = 64 << 20
HOST = "127.0.0.1"


def why_not() -> str:
    """Why it cannot run here; empty if it can."""
    if importlib.util.find_spec("mooncake") is None:
        return "mooncake-transfer-engine is not installed"
    command = [sys.executable, "-c", "import mooncake.store"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


WHY_NOT = why_not()
needs_mooncake = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


class Program:
    """One of Mooncake's, until it is killed."""

    def __init__(self, name: str, log_file: Path, options: dict[str, object]) -> None:
        [folder] = importlib.util.find_spec("mooncake").submodule_search_locations
        self._command = [str(Path(folder, name))]
        self._command += [f"--{option}={value}" for option, value in options.items()]
        self._log_file = log_file
        self.start()

    def start(self) -> None:
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while not self.is_ready():
            assert self._process.poll() is None, self._log_file.read_text()
            assert time.monotonic() < deadline, self._log_file.read_text()
            time.sleep(0.02)

    def is_ready(self) -> bool:
        raise NotImplementedError

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()


class Master(Program):
    """Knows what lies where."""

    def __init__(self, directory: Path, **others: object) -> None:
        self.port = free_port()
        options = {"rpc_address": HOST, "rpc_port": self.port}
        options |= {"metrics_host": HOST, "metrics_port": free_port(), **others}
        super().__init__("mooncake_master", directory / f"{self.port}.log", options)

    @property
    def url(self) -> str:
        return f"mooncake://{HOST}:{self.port}"

    def is_ready(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex((HOST, self.port)) == 0


class Contributor(Program):
    """Holds the bytes."""

    def __init__(
        self, directory: Path, master: Master, metadata_server: str = "P2PHANDSHAKE"
    ) -> None:
        port = free_port()
        options = {"host": HOST, "port": port, "metadata_server": metadata_server}
        options["master_server_address"] = f"{HOST}:{master.port}"
        options["global_segment_size"] = f"{POOL_BYTES >> 20} MB"
        super().__init__("mooncake_client", directory / f"{port}.log", options)

    def is_ready(self) -> bool:
        return "Starting real client service" in self._log_file.read_text()
