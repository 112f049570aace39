from __future__ import annotations

import builtins
import hashlib
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest
from ports import free_port
from redis_server import RedisServer, needs_server

from lmcache.backends.redis import LARGEST, RedisBackend, lmcache_backends
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.testing import BackendSuite

MB = 1_000_000
NOBODY = "redis://127.0.0.1:1?timeout=1"


@pytest.fixture(scope="module")
def lasting_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def open_one():
    opened = []

    def open_one(url):
        opened.append(RedisBackend.from_url(url))
        return opened[-1]

    yield open_one
    for backend in opened:
        backend.close()


def key(n: int) -> bytes:
    return hashlib.sha256(b"%d" % n).digest()


def put(backend: RedisBackend, n: int, size: int = 1000) -> bool:
    return backend.put(key(n), memoryview((key(n) * (size // 32 + 1))[:size]))


def got(backend: RedisBackend, n: int, room: int = MB) -> bytes | None:
    out = memoryview(bytearray(room))
    size = backend.get_into(key(n), out)
    return None if size is None else bytes(out[:size])


@needs_server
class TestRedis(BackendSuite):
    @pytest.fixture
    def url(self, lasting_server):
        return lasting_server.url


@needs_server
class TestExpiringRedis(BackendSuite):
    """With a time to live another command reads."""

    @pytest.fixture
    def url(self, lasting_server):
        return f"{lasting_server.url}/1?ttl=100&prefix=a b:"


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def new_cluster(tmp_path_factory):
    """Starts two servers, each with half of the slots, whenever it is called."""
    servers = []

    def new_cluster():
        pair = []
        for _ in range(2):
            folder = tmp_path_factory.mktemp("cluster")
            pair.append(RedisServer(folder, "--cluster-enabled", "yes"))
            servers.append(pair[-1])
        for server, slots in zip(pair, [(0, 8191), (8192, 16383)], strict=True):
            assert server.say("CLUSTER", "ADDSLOTSRANGE", *slots) == b"+OK\r\n"
        pair[0].say("CLUSTER", "SET-CONFIG-EPOCH", 1)
        assert pair[0].say("CLUSTER", "MEET", "127.0.0.1", pair[1].port) == b"+OK\r\n"
        for server in pair:
            wait_until(lambda s=server: b"cluster_state:ok" in s.say("CLUSTER", "INFO"))
            wait_until(lambda s=server: s.say("CLUSTER", "NODES").count(b" connected") == 2)
        return pair

    yield new_cluster
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def cluster(new_cluster):
    return new_cluster()


@needs_server
class TestCluster(BackendSuite):
    """Two servers, each with half of the keys."""

    @pytest.fixture
    def url(self, cluster):
        return f"{cluster[0].url}?cluster=true"

    def test_both_hold_something(self, backend, keys, cluster):
        for n in range(50):
            backend.put(keys(n), memoryview(b"x"))
        assert all(int(server.say("DBSIZE")[1:-2]) > 5 for server in cluster)
        assert backend.count_leading([keys(n) for n in range(51)]) == 50


@needs_server
class TestClusterFailures:
    def test_a_server_that_hangs_costs_a_few_timeouts_however_much_is_asked(
        self, new_cluster, open_one
    ):
        first, second = new_cluster()
        backend = open_one(f"{first.url}?cluster=true&timeout=1")
        names = [key(n) for n in range(100)]
        for n in range(100):
            put(backend, n, 10)
        assert backend.count_leading(names) == 100
        second.signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(BackendError, match="the cluster at 127.0.0.1"):
            backend.count_leading(names)
        assert time.monotonic() - started < 10
        second.signal(signal.SIGCONT)
        wait_until(lambda: b"cluster_state:ok" in first.say("CLUSTER", "INFO"))
        assert backend.count_leading(names) == 100

    def test_slots_that_have_moved_are_found(self, new_cluster, open_one):
        first, second = new_cluster()
        backend = open_one(f"{first.url}?cluster=true&prefix={{same}}:")  # all in one slot
        for n in range(10):
            put(backend, n, 10)
        names = [key(n) for n in range(10)]
        assert backend.count_leading(names) == 10
        slot = int(first.say("CLUSTER", "KEYSLOT", "{same}:")[1:-2])
        source, target = (first, second) if slot < 8192 else (second, first)
        ids = {s: s.say("CLUSTER", "MYID").split(b"\r\n")[1].decode() for s in (source, target)}
        target.say("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.say("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        for name in names:
            whole = f"{{same}}:{name.hex()}"
            moved = source.say("MIGRATE", "127.0.0.1", target.port, whole, 0, 5000)
            assert moved == b"+OK\r\n"
        for server in (target, source):
            server.say("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        assert backend.count_leading(names) == 10
        assert got(backend, 3) is not None

    def test_a_cluster_that_has_moved_is_found_by_its_name(self, new_cluster, open_one):
        old, new = new_cluster(), new_cluster()
        backend = open_one(f"{old[0].url}?cluster=true&timeout=1")
        put(backend, 1)
        for server in old:
            server.kill()
        with pytest.raises(BackendError):
            put(backend, 1)
        backend._options["port"] = new[0].port  # as if the name led somewhere else now
        wait_until(lambda: succeeds(lambda: put(backend, 1)))


def succeeds(call):
    try:
        return call()
    except BackendError:
        return False


@needs_server
class TestRoom:
    def test_a_full_server_that_may_not_evict_refuses(self, new_redis, open_one):
        server = new_redis("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
        backend = open_one(server.url)
        taken = [put(backend, n, MB // 2) for n in range(10)]
        assert taken[0] is True
        assert taken[-1] is False
        assert [got(backend, n) is not None for n in range(10)] == taken

    def test_one_that_may_evict_loses_the_oldest(self, new_redis, open_one):
        server = new_redis("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru")
        backend = open_one(server.url)
        assert all(put(backend, n, MB // 2) for n in range(10))
        assert got(backend, 0) is None
        assert got(backend, 9) is not None

    def test_an_object_larger_than_the_server_takes_is_refused(self, lasting_server, open_one):
        class Huge:
            nbytes = LARGEST + 1

        assert open_one(lasting_server.url).put(key(1), Huge()) is False

    def test_what_nobody_reads_goes(self, lasting_server, open_one):
        backend = open_one(f"{lasting_server.url}?ttl=4&prefix=short:")
        put(backend, 1)
        put(backend, 2)
        for _ in range(10):
            time.sleep(0.5)
            assert got(backend, 1) is not None
        assert got(backend, 2) is None


@needs_server
class TestApart:
    def test_prefixes_and_databases_do_not_meet(self, lasting_server, open_one):
        url = lasting_server.url
        ends = ["?prefix=one:", "?prefix=two:", "/3?prefix=one:"]
        one, *others = (open_one(url + end) for end in ends)
        put(one, 1)
        assert not any(other.contains(key(1)) for other in others)
        assert lasting_server.say("EXISTS", f"one:{key(1).hex()}") == b":1\r\n"

    def test_two_clients_share(self, lasting_server, open_one):
        put(open_one(f"{lasting_server.url}?prefix=shared:"), 1)
        assert got(open_one(f"{lasting_server.url}?prefix=shared:"), 1) is not None


@needs_server
class TestFailures:
    def test_the_server_may_come_and_go(self, new_redis, open_one):
        server = new_redis()
        backend = open_one(server.url)
        put(backend, 1)
        server.kill()
        for call in (put, got):
            with pytest.raises(BackendError, match=f"127.0.0.1:{server.port} failed us"):
                call(backend, 1)
        server.start()
        assert got(backend, 1) is None
        assert put(backend, 1)
        assert got(backend, 1) is not None

    def test_a_server_started_anew_between_two_calls_costs_nothing(self, new_redis, open_one):
        server = new_redis()
        backend = open_one(server.url)
        put(backend, 1)
        server.kill()
        server.start()
        assert put(backend, 2)

    def test_a_server_that_hangs_costs_the_timeout(self, new_redis, open_one):
        server = new_redis()
        backend = open_one(f"{server.url}?timeout=1")
        put(backend, 1)
        server.signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(BackendError):
            got(backend, 1)
        assert time.monotonic() - started < 4
        server.signal(signal.SIGCONT)
        assert got(backend, 1) is not None

    def test_killed_under_load_it_shows_no_torn_object(self, new_redis, open_one):
        server = new_redis()
        backend = open_one(server.url)
        errors, stop = [], threading.Event()

        def work(first):
            n = first
            while not stop.is_set():
                n += 4
                try:
                    put(backend, n, 200_000)
                    data = got(backend, n)
                except BackendError:
                    continue
                if data not in (None, (key(n) * (200_000 // 32 + 1))[:200_000]):
                    errors.append(n)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            time.sleep(0.2)
            server.kill()
            server.start()
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert errors == []
        assert put(backend, 0)

    def test_nobody_there(self, open_one):
        backend = open_one(NOBODY)  # which is no reason not to start
        with pytest.raises(BackendError, match="127.0.0.1:1 failed us"):
            backend.contains(key(1))
        with pytest.raises(BackendError):
            open_one(f"{NOBODY}&cluster=true").contains(key(1))

    def test_one_that_knows_the_old_protocol_only(self, new_redis, open_one):
        assert put(open_one(new_redis("--rename-command", "HELLO", "").url), 1)

    def test_a_value_that_is_no_object(self, lasting_server, open_one):
        backend = open_one(f"{lasting_server.url}?prefix=odd:")
        lasting_server.say("LPUSH", f"odd:{key(1).hex()}", "x")
        with pytest.raises(BackendError, match="WRONGTYPE"):
            got(backend, 1)


@needs_server
class TestPasswords:
    @pytest.fixture
    def server(self, new_redis):
        return new_redis("--requirepass", "p@ss:w/rd")

    def test_in_the_url(self, server, open_one):
        assert put(open_one(f"redis://:p%40ss%3Aw%2Frd@127.0.0.1:{server.port}"), 1)

    def test_in_the_environment(self, server, open_one, monkeypatch):
        monkeypatch.setenv("LMCACHE_REDIS_PASSWORD", "p@ss:w/rd")
        assert put(open_one(server.url), 1)
        assert put(open_one(f"redis://default@127.0.0.1:{server.port}"), 2)

    @pytest.mark.parametrize("user", ["", ":guess@", "guess:guess@"])
    def test_wrong_ones_are_told_and_never_shown(self, server, open_one, user):
        with pytest.raises(BackendError) as caught:
            put(open_one(f"redis://{user}127.0.0.1:{server.port}"), 1)
        assert "guess" not in str(caught.value)


@needs_server
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
class TestTls:
    @pytest.fixture
    def secured(self, tmp_path, new_redis):
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
        command += ["-addext", "subjectAltName=DNS:localhost"]
        command += ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
        subprocess.run(command, check=True, capture_output=True)
        options = ["--tls-port", "0", "--tls-cert-file", str(tmp_path / "cert.pem")]
        options += ["--tls-key-file", str(tmp_path / "key.pem"), "--tls-auth-clients", "no"]
        server = new_redis(*options)
        port = free_port()
        assert server.say("CONFIG", "SET", "tls-port", port) == b"+OK\r\n"
        return f"rediss://localhost:{port}", str(tmp_path / "cert.pem")

    def test_with_a_certificate_that_is_trusted(self, secured, open_one, monkeypatch):
        url, certificate = secured
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        backend = open_one(url)
        assert put(backend, 1)
        assert got(backend, 1) is not None

    def test_with_one_of_another_host(self, secured, open_one, monkeypatch):
        url, certificate = secured
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        with pytest.raises(BackendError, match="certificate"):
            put(open_one(url.replace("localhost", "127.0.0.1")), 1)

    def test_with_one_that_is_not(self, secured, open_one):
        with pytest.raises(BackendError, match="certificate"):
            put(open_one(secured[0]), 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis:///0", "write redis://host:port/number-of-the-database"),
        ("valkey://host/name", "write valkey://host:port/number-of-the-database"),
        ("redis://host?ttl=0", "option 'ttl': '0' is not a whole number, 1 to 999999999"),
        ("redis://host?ttl=1h", "option 'ttl': '1h' is not a whole number"),
        ("redis://host:0", "write redis://host:port"),
        ("redis://host/\u00b2", "write redis://host:port"),
        ("redis://host/3?cluster=true", "a cluster has no databases with numbers"),
        (f"redis://host?ttl={'9' * 5000}", "is not a whole number"),
        ("redis://host?timeout=-1", "option 'timeout': '-1' is not"),
        ("redis://host?cluster=yes", "option 'cluster': 'yes' is neither true nor false"),
        ("redis://host?prefx=x", "did you mean 'prefix'"),
    ],
)
def test_urls_that_make_no_sense(url, message):
    with pytest.raises(ConfigError, match=message):
        RedisBackend.from_url(url)


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without_redis(name, *args, **kwargs):
        if name.split(".")[0] == "redis":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_redis)
    with pytest.raises(ConfigError, match=r"pip install 'lmcache\[redis\]'"):
        RedisBackend.from_url("redis://host")


def test_closed_before_it_was_used():
    backend = RedisBackend.from_url(NOBODY)
    backend.close()
    for call in (backend.contains, lambda _: backend.count_leading([])):
        with pytest.raises(BackendClosed):
            call(key(1))


@needs_server
@pytest.mark.parametrize("end", ["", "?cluster=true"])
def test_closed_under_calls(lasting_server, cluster, end):
    url = cluster[0].url if end else lasting_server.url
    seen = []

    def work(backend, n):
        try:
            while True:
                put(backend, n)
                got(backend, n)
        except Exception as error:
            seen.append(type(error))

    for _ in range(5):
        backend = RedisBackend.from_url(url + end)
        threads = [threading.Thread(target=work, args=(backend, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        backend.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert set(seen) == {BackendClosed}


def test_its_schemes():
    assert [spec.scheme for spec in lmcache_backends()] == ["redis", "rediss", "valkey", "valkeys"]
    assert all(spec.open("valkeys://host") for spec in lmcache_backends())


@pytest.mark.skipif("LMCACHE_TEST_SERVERS" not in os.environ, reason="not asked for")
def test_the_servers_are_there():
    """Where all of the tests are meant to run, none of them may be skipped unseen."""
    assert needs_server.args == (False,)
