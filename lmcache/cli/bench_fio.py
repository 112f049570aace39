"""What fio reaches in the directory of a file backend, to stand beside what the backend does.

Each of its threads writes one file, request by request, with blocks that are allotted before and
were never written; reads what it wrote; and writes it again. It passes the page cache if the
backend does. Of memory it needs one request for each thread, which mostly stays in the processor's
cache; the backend's requests come from as much memory as they fill.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from lmcache.core.backend import StorageBackend


class Fio:
    """fio in `directory`, past the page cache if `direct`."""

    def __init__(self, directory: str, *, direct: bool) -> None:
        self._directory = directory
        self._direct = direct

    def measure(self, size: int, depth: int, count: int) -> dict[str, float]:
        """GB/s of `count` requests of `size` bytes, put and got by `depth` threads."""
        case, rates = (size, depth, max(1, count // depth)), {}
        with tempfile.TemporaryDirectory(dir=self._directory, prefix="fio-") as folder:
            rates["fio_put_gb_s"] = self._run(folder, "write", *case)
            rates["fio_get_gb_s"] = self._run(folder, "read", *case)
            rates["fio_again_put_gb_s"] = self._run(folder, "write", *case, "--overwrite=1")
        return rates

    def _run(
        self, folder: str, job: str, size: int, depth: int, requests: int, *options: str
    ) -> float:
        os.sync()  # what it deleted before is not to be its burden
        command = ["fio", "--name=lmcache", f"--directory={folder}", f"--rw={job}"]
        command += [f"--direct={int(self._direct)}", "--ioengine=psync", "--invalidate=0"]
        command += [f"--bs={size}", f"--size={requests * size}", *options]
        command += [f"--numjobs={depth}", "--thread", "--fallocate=native"]
        command += ["--group_reporting", "--output-format=json"]
        done = subprocess.run(command, capture_output=True, check=False, text=True)  # noqa: S603
        if done.returncode:
            raise ConfigError(f"fio cannot run in {folder}: {done.stderr.strip()[:200]}")
        rate: float = json.loads(done.stdout)["jobs"][0][job]["bw_bytes"] / 1e9
        return rate


def fio_beside(store: StorageBackend) -> Fio | None:
    """For the directory of `store`; None if that is not the file backend, or there is no fio."""
    from lmcache.backends.disk import DiskBackend

    if not isinstance(store, DiskBackend) or shutil.which("fio") is None:
        return None
    return Fio(store.directory, direct=store.is_direct)
