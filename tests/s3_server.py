"""A real SeaweedFS, which speaks S3, on ports of its own."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from functools import reduce
from pathlib import Path

import pytest
from ports import free_ports

PROGRAM = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
needs_s3 = pytest.mark.skipif(PROGRAM is None, reason="SeaweedFS is not installed")

KEY_ID, SECRET = "key-of-tests", "secret/of+tests"
BUCKET = "things"
DOMAIN = "store.test"
"""The server answers for each bucket as `bucket.store.test`, too."""
PARTS = ("s3", "filer", "master", "volume")


class S3Server:
    """Runs until it is killed, and finds what it stored when it is started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        about = {"name": "tests", "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}]}
        identities = {"identities": [{**about, "actions": ["Admin"]}]}
        (directory / "identities.json").write_text(json.dumps(identities))
        for attempt in range(5):  # somebody else may have been given a port meanwhile
            self._ports = free_ports(2 * len(PARTS))
            self.port = self._ports[0]
            try:
                self.start()
            except AssertionError:
                self.kill()
                if attempt == 4:
                    raise
            else:
                return

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """With credentials, and an option already."""
        secret = SECRET.replace("/", "%2F").replace("+", "%2B")
        return f"s3://{KEY_ID}:{secret}@{BUCKET}/some/where?endpoint={self.endpoint}"

    def start(self) -> None:
        command = [PROGRAM, "-logtostderr", "server", "-s3", "-filer", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", f"-dir={self._directory}", "-volume.max=20"]
        command += [f"-s3.config={self._directory}/identities.json"]
        command += ["-master.volumeSizeLimitMB=256", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-s3.autoCreateBucket=false", f"-s3.domainName={DOMAIN}"]
        command += ["-master.telemetry=false"]  # nothing here speaks to anybody outside
        for part, port, grpc in zip(PARTS, self._ports, self._ports[len(PARTS) :], strict=False):
            command += [f"-{part}.port={port}", f"-{part}.port.grpc={grpc}"]
        # or it waits for other masters' votes when it is started again
        command += ["-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms"]
        log_file = self._directory / "log"
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, log_file.read_text()[-5000:]
            assert time.monotonic() < deadline, log_file.read_text()[-5000:]
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether it takes objects, which is some time after it has begun to listen."""
        try:
            self.say("PUT", f"/{BUCKET}")
            return self.say("PUT", f"/{BUCKET}/first", body=b"x")[0] == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
        for port in self._ports:  # what it makes for itself, whatever it is told
            for sock in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                sock.unlink()

    def end(self) -> None:
        """Kill it for good, with all that it stored."""
        self.kill()
        shutil.rmtree(self._directory)

    def say(self, method: str, path: str, query: str = "", body: bytes = b"") -> tuple[int, str]:
        """The status and the text of the answer to a request by its owner."""
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        headers = {
            "host": f"127.0.0.1:{self.port}",
            "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
            "x-amz-date": now,
        }
        names = ";".join(headers)
        lines = [f"{name}:{value}" for name, value in headers.items()]
        asked = "\n".join([method, path, query, *lines, "", names, "UNSIGNED-PAYLOAD"])
        scope = f"{now[:8]}/us-east-1/s3/aws4_request"
        digest = hashlib.sha256(asked.encode()).hexdigest()
        words = [*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"]
        signature = reduce(
            lambda key, word: hmac.digest(key, word.encode(), "sha256"),
            words,
            f"AWS4{SECRET}".encode(),
        )
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={KEY_ID}/{scope}, "
            f"SignedHeaders={names}, Signature={signature.hex()}"
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, f"{path}?{query}" if query else path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def names(self) -> list[str]:
        """Of all objects of the bucket."""
        return re.findall("<Key>([^<]*)</Key>", self.say("GET", f"/{BUCKET}", "list-type=2")[1])

    def uploads(self) -> list[str]:
        """The names of objects that are being sent in parts."""
        return re.findall("<Key>([^<]*)</Key>", self.say("GET", f"/{BUCKET}", "uploads=")[1])
