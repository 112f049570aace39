"""`lmcache server` as a process: what it opens, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import typer

from lmcache.backends.s3_url import OPTIONS, bucket_of
from lmcache.cli import bench, bench_pages
from lmcache.cli.l2_adapter import url_of
from lmcache.cli.output import Format
from lmcache.core.errors import ConfigError, ServiceError
from lmcache.core.service import wire
from lmcache.core.service.link import Link
from lmcache.core.urls import parse_url

SERVING = re.compile(r"Serving engines at (\S+), people at (http://\S+?):(\d+):")
PATIENCE_S = 30
TOKEN = "geheim-ß"
EVERYWHERE = "0.0.0.0"  # noqa: S104


class Process:
    """A server with ports of its own choice."""

    def __init__(self, *options, **environment):
        ports = ["--port", "0", "--http-port", "0", "--l1-size-gb", "0.05"]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("LMCACHE_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lmcache", "server", *ports, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**clean, "NO_COLOR": "1", "COLUMNS": "400", **environment},
        )
        self.pid = self._process.pid
        self.said = ""

    def wait_serving(self):
        for line in self._process.stdout:
            self.said += line
            if found := SERVING.search(line):
                self.endpoint = found[1].replace(EVERYWHERE, "127.0.0.1")
                self.url = f"{found[2].replace(EVERYWHERE, '127.0.0.1')}:{found[3]}"
                return self
        raise AssertionError(self.said)

    def wait(self):
        """Its exit status; what it said is in `said`."""
        try:
            rest, _ = self._process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self.said += rest
        return self._process.returncode

    def send(self, number):
        self._process.send_signal(number)

    def close_stdin(self):
        self._process.stdin.close()
        self._process.stdin = None

    def get(self, path, token=None, body=None):
        """The status of an answer."""
        request = urllib.request.Request(f"{self.url}/{path}", body)  # noqa: S310
        if body:
            request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}".encode().decode("latin-1"))
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def attach(self, token=""):
        """What an engine without workers is told."""
        link = Link(self.endpoint)
        about = wire.Attach(release="test", engine="nobody's", name="test", movers=1, token=token)
        try:
            return link.call(about, PATIENCE_S)
        finally:
            link.close()

    def end(self):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


@pytest.fixture
def start():
    started = []

    def start(*options, **environment):
        started.append(Process(*options, **environment))
        return started[-1]

    yield start
    for process in started:
        process.end()


def inodes(pid):
    """The sockets of a process."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:  # closed meanwhile: no socket that stays open
            continue
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            found.add(match[1])
    return found


def listening(pid):
    """Address and port of every TCP or UDP socket of a process that takes what comes."""
    own, found = inodes(pid), []
    for kind, wanted in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == wanted and inode in own:
                host, port = local.split(":")
                family = socket.AF_INET6 if kind.endswith("6") else socket.AF_INET
                words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                packed = struct.pack(f"={len(words)}I", *words)
                found.append((socket.inet_ntop(family, packed), int(port, 16)))
    return sorted(found)


def named_unix_sockets(pid):
    own = inodes(pid)
    lines = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    return [line.split()[7] for line in lines if len(line.split()) > 7 and line.split()[6] in own]


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@linux
class TestPorts:
    def test_two_on_loopback_and_no_other(self, start):
        server = start().wait_serving()
        ports = sorted(int(url.rpartition(":")[2]) for url in (server.endpoint, server.url))
        assert listening(server.pid) == [("127.0.0.1", port) for port in ports]
        assert named_unix_sockets(server.pid) == []

    def test_the_scan_sees_what_is_open_to_others(self, start):
        server = start("--host", EVERYWHERE, "--http-host", "::", "--insecure")
        server.wait_serving()
        assert [host for host, _ in listening(server.pid)] == [EVERYWHERE, "::"]


class TestWideBinds:
    @pytest.mark.parametrize("option", ["--host", "--http-host"])
    @pytest.mark.parametrize("host", [EVERYWHERE, "::", "192.0.2.1", "example.org"])
    def test_refused_without_a_token(self, start, option, host):
        server = start(option, host)
        assert server.wait() == 2
        assert f"{host} can be reached from other machines: set LMCACHE_TOKEN" in server.said
        assert "Serving" not in server.said
        assert "Traceback" not in server.said

    def test_with_a_token_nobody_gets_in_without_it(self, start):
        server = start("--host", EVERYWHERE, "--http-host", EVERYWHERE, LMCACHE_TOKEN=TOKEN)
        server.wait_serving()
        for path in ("metrics", "status", "leases", "openapi.json", "docs"):
            assert server.get(path) == 401
            assert server.get(path, "another") == 401
            assert server.get(path, TOKEN) == 200
        assert server.get("clear", body=b"{}") == 401
        assert server.get("clear", TOKEN, b"{}") == 200
        assert [server.get(path) for path in ("healthcheck", "readyz")] == [200, 200]
        for wrong in ("", "another"):
            refused = server.attach(wrong)
            assert isinstance(refused, wire.Refused)
            assert "token" in refused.why
        late = server.attach(TOKEN)  # let in, and then there is nobody to visit
        assert isinstance(late, wire.Refused)
        assert "token" not in late.why
        assert TOKEN not in server.said

    def test_a_token_on_loopback_counts_too(self, start):
        server = start(LMCACHE_TOKEN=TOKEN).wait_serving()
        assert server.get("status") == 401
        assert server.get("status", TOKEN) == 200


class TestTheEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_by_a_signal(self, start, number):
        server = start().wait_serving()
        server.send(number)
        assert server.wait() == 0
        assert "Stopped" in server.said
        assert "Traceback" not in server.said

    def test_with_its_standard_input(self, start):
        server = start("--while-stdin").wait_serving()
        server.close_stdin()
        assert server.wait() == 0

    @linux
    def test_nothing_stays_behind_a_kill(self, start, tmp_path):
        def names():
            return {str(path) for place in ("/dev/shm", "/tmp") for path in Path(place).iterdir()}

        before = names()
        server = start(TMPDIR=str(tmp_path)).wait_serving()
        server.send(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert not [name for name in names() - before if "lmcache" in name.lower()]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tier", ["", "file://{}/tier?max_size=50MB"])
def test_bench_server_passes(start, tier, tmp_path):
    """With a slower tier, too, which has to be asked about what is nowhere."""
    server = start(*(["--l2", tier.format(tmp_path)] if tier else [])).wait_serving()
    command = [sys.executable, "-m", "lmcache", "bench", "server", "--rpc-url", server.endpoint]
    command += ["--url", server.url, "--mode", "cpu", "--num-tokens", "512", "--end", "3"]
    command += ["--kvcache-shape-spec", "(2,64,16,2,16):float16:2", "--format", "json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert (said["requests"], said["checksum_ok"], said["pass_rate"]) == (3, 3, 100.0)


@pytest.mark.parametrize("transfer_mode", ["engine_driven", "lmcache_driven"])
def test_bench_server_with_pages_on_a_device(start, transfer_mode, monkeypatch, capsys):
    """The CPU stands in for it: torch holds the pages, and who copies depends on where they are."""
    pytest.importorskip("torch")
    real = bench_pages.DevicePages

    def on_cpu(shapes, device, *, lends):
        assert device == "cuda"
        return real(shapes, "cpu", lends=lends)

    monkeypatch.setattr(bench_pages, "DevicePages", on_cpu)
    server = start().wait_serving()
    with pytest.raises(typer.Exit) as ended:
        bench.server(
            rpc_url=server.endpoint,
            mode="gpu",
            transfer_mode=transfer_mode,
            end=3,
            interval=0,
            kvcache_shape_spec="(2,64,16,2,16):float16:2",
            output_format=Format.JSON,
        )
    assert ended.value.exit_code == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["requests"], said["checksum_ok"], said["pass_rate"]) == (3, 3, 100.0)


def test_bench_server_without_a_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        bench.server(mode="gpu")


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--supported-transfer-mode", "telepathy"], "expected auto or engine_driven or"),
            (["--eviction-policy", "LRUU"], "LRU"),
            (["--chunk-size", "0"], "chunk_size"),
            (["--l1-size-gb", "0"], "max_local_cpu_size"),
            (["--l2", "nowhere://x"], "nowhere"),
            (["--l2-adapter", "{}"], "no JSON object with a type"),
            (["--host", "not a host"], "not a host"),
        ],
    )
    def test_one_line_names_it(self, start, options, text):
        server = start(*options)
        assert server.wait() == 2
        assert text in server.said
        assert "Traceback" not in server.said

    @pytest.mark.parametrize("option", ["--port", "--http-port"])
    def test_a_port_that_is_taken(self, start, option):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = start(option, str(port))
            assert server.wait() == 2
        assert "cannot listen on" in server.said
        assert str(port) in server.said

    def test_engines_do_not_find_what_is_not_there(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match="no server listens"):
            Link(f"tcp://127.0.0.1:{port}")


class TestTiersAsUpstreamWritesThem:
    def test_a_folder(self):
        about = {"type": "fs", "base_path": "/var/kv", "max_capacity_gb": 12, "num_workers": 4}
        assert url_of(json.dumps(about)) == "file:///var/kv?max_size=12GB"

    @pytest.mark.parametrize(
        ("said", "url"),
        [
            ({}, "redis://h:6379"),
            ({"password": "p@:/?"}, "redis://:p%40%3A%2F%3F@h:6379"),
            ({"username": "u", "password": "p", "num_workers": 8}, "redis://u:p@h:6379"),
            ({"max_capacity_gb": 5}, "redis://h:6379"),
            ({"host": "::1", "username": None, "password": None}, "redis://[::1]:6379"),
        ],
    )
    def test_redis(self, said, url):
        assert url_of(json.dumps({"type": "resp", "host": "h", "port": 6379, **said})) == url

    @pytest.mark.parametrize(
        ("said", "url"),
        [
            (
                {},
                "s3://store?region=eu-1&endpoint=https%3A%2F%2Fs3.x%3A9000&virtual_hosted=true",
            ),
            (
                {
                    "disable_tls": True,
                    "s3_num_io_threads": 64,
                    "s3_enable_s3express": False,
                    "aws_access_key_id": "k",
                    "aws_secret_access_key": "s/+",
                },
                "s3://k:s%2F%2B@store?region=eu-1&endpoint=http%3A%2F%2Fs3.x%3A9000&virtual_hosted=true",
            ),
        ],
    )
    @pytest.mark.parametrize("scheme", ["", "s3://"])
    def test_s3(self, scheme, said, url, monkeypatch):
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        about = {"s3_endpoint": f"{scheme}store.s3.x:9000", "s3_region": "eu-1", **said}
        assert url_of(json.dumps({"type": "s3", **about})) == url
        where = "http" if said else "https"
        bucket = bucket_of(parse_url(url, options=OPTIONS))
        assert bucket._label == f"the bucket store at {where}://store.s3.x:9000"

    @pytest.mark.parametrize(
        ("said", "url"),
        [
            ({}, "mooncake://m:50051"),
            ({"global_segment_size": "0", "protocol": "tcp"}, "mooncake://m:50051?protocol=tcp"),
            (
                {
                    "local_hostname": "here",
                    "metadata_server": "P2PHANDSHAKE",
                    "global_segment_size": 99,
                    "local_buffer_size": "9",
                    "protocol": "rdma",
                    "rdma_devices": "mlx5_0",
                    "per_op_workers": {"lookup": 2},
                },
                "mooncake://m:50051?metadata=P2PHANDSHAKE&segment=99&buffer=9&protocol=rdma&device=mlx5_0",
            ),
        ],
    )
    def test_mooncake(self, said, url):
        about = {"type": "mooncake_store", "master_server_addr": "m:50051", **said}
        assert url_of(json.dumps(about)) == url

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("fs", "no JSON object"),
            ("[]", "no JSON object"),
            ('{"base_path": "/x"}', "with a type"),
            ('{"type": "resp", "host": "x"}', "needs 'port'"),
            ('{"type": "resp", "host": "x", "port": 1, "base_path": "/"}', "base_path"),
            ('{"type": "nixl"}', "'nixl' is not known"),
            ('{"type": "s3", "s3_region": "x"}', "needs 's3_endpoint'"),
            (
                '{"type": "s3", "s3_region": "", "s3_endpoint": "b.h", "s3_enable_s3express": 1}',
                "S3 Express",
            ),
            ('{"type": "mooncake_store"}', "needs 'master_server_addr'"),
            ('{"type": "fs", "base_path": "/x"}', "needs 'max_capacity_gb'"),
            ('{"type": "fs", "base_path": "/x", "max_capacity_gb": 1, "colour": 1}', "colour"),
        ],
    )
    def test_mistakes_are_named(self, text, why):
        with pytest.raises(ConfigError, match=re.escape(why)):
            url_of(text)
