from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from mooncake_server import POOL_BYTES, WHY_NOT, Contributor, Master, needs_mooncake
from ports import free_port

from lmcache.backends.mooncake import MooncakeBackend, from_url, lmcache_backends
from lmcache.backends.mooncake_child import CHECKSUM, LANES, Call
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.testing import BackendSuite

MB = 1_000_000
NOBODY = "mooncake://127.0.0.1:1?timeout=1"


@pytest.fixture(scope="module")
def lasting_pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mooncake")
    master = Master(folder)
    contributor = Contributor(folder, master)
    yield master
    contributor.kill()
    master.kill()


@pytest.fixture
def new_master(tmp_path):
    masters = []

    def new_master(**options):
        masters.append(Master(tmp_path, **options))
        return masters[-1]

    yield new_master
    for master in masters:
        master.kill()


@pytest.fixture
def new_pool(tmp_path, new_master):
    """Starts a master and a contributor, each time it is called."""
    contributors = []

    def new_pool(**options):
        master = new_master(**options)
        contributors.append(Contributor(tmp_path, master))
        return master, contributors[-1]

    yield new_pool
    for contributor in contributors:
        contributor.kill()


@pytest.fixture
def open_one():
    opened = []

    def open_one(url):
        opened.append(from_url(url))
        return opened[-1]

    yield open_one
    clients = [client(backend) for backend in opened if backend._process]
    for backend in opened:
        backend.close()
    assert not any(map(is_alive, clients))


def client(backend: MooncakeBackend) -> int:
    """The process that holds Mooncake's client."""
    return backend._process._process.pid


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def key(n: int) -> bytes:
    return hashlib.sha256(b"%d" % n).digest()


def content(n: int, size: int) -> bytes:
    return (key(n) * (size // 32 + 1))[:size]


def put(backend: MooncakeBackend, n: int, size: int = 1000) -> bool:
    return backend.put(key(n), memoryview(content(n, size)))


def got(backend: MooncakeBackend, n: int, room: int = MB) -> bytes | None:
    out = memoryview(bytearray(room))
    size = backend.get_into(key(n), out)
    return None if size is None else bytes(out[:size])


def succeeds(call):
    try:
        return call()
    except BackendError:
        return False


@needs_mooncake
class TestMooncake(BackendSuite):
    @pytest.fixture
    def url(self, lasting_pool):
        return f"{lasting_pool.url}?prefix=a b:"


@needs_mooncake
class TestRoom:
    def test_a_full_pool_refuses_if_all_of_it_is_being_read(self, new_pool, open_one):
        master, _ = new_pool()
        backend = open_one(master.url)
        size = 6 * MB
        kept = {}
        for n in range(POOL_BYTES // size + 3):
            kept[n] = put(backend, n, size)
            assert got(backend, n, size) == (content(n, size) if kept[n] else None)
        assert kept[0] is True
        assert kept[n] is False
        for n, is_there in kept.items():
            assert got(backend, n, size) == (content(n, size) if is_there else None)

    def test_a_full_pool_loses_what_nobody_has_read(self, new_pool, open_one):
        master, _ = new_pool()
        backend = open_one(master.url)
        size = 6 * MB
        numbers = range(3 * POOL_BYTES // size)
        for n in numbers:
            wait_until(lambda n=n: put(backend, n, size))
        there = [got(backend, n, size) for n in numbers]
        assert there[0] is None
        assert there[-1] == content(numbers[-1], size)
        assert all(data in (None, content(n, size)) for n, data in enumerate(there))

    def test_a_pool_to_which_nobody_contributes_refuses(self, new_master, open_one):
        assert put(open_one(new_master().url), 1) is False

    def test_what_does_not_go_through_the_buffer_is_refused(self, lasting_pool, open_one):
        backend = open_one(f"{lasting_pool.url}?buffer=8MiB")
        most = (1 << 20) - CHECKSUM.size
        assert put(backend, 1, most) is True
        assert put(backend, 2, most + 1) is False
        assert got(backend, 1, 2 << 20) == content(1, most)
        assert backend.remove(key(1))

    def test_what_others_put_through_a_larger_one_is_a_miss(self, lasting_pool, open_one):
        large, small = open_one(lasting_pool.url), open_one(f"{lasting_pool.url}?buffer=8MiB")
        assert put(large, 3, 2 << 20)
        assert small.contains(key(3))
        assert got(small, 3, 4 << 20) is None
        assert large.remove(key(3))

    @pytest.mark.parametrize("size", [1000 + CHECKSUM.size, 1000, CHECKSUM.size - 1])
    def test_what_is_not_whole_is_a_miss_and_goes(self, lasting_pool, open_one, size):
        """As when the pool has lent its memory to another object while it was read."""
        backend = open_one(lasting_pool.url)
        with backend._lane() as lane:
            lane.fill(memoryview(content(5, 1000)))
            lane._memory[3] ^= 1
            assert lane.ask(Call.PUT, key(5), size) == 0
        assert backend.contains(key(5))
        assert got(backend, 5) is None
        assert not backend.contains(key(5))
        assert put(backend, 5)
        assert got(backend, 5) == content(5, 1000)
        assert backend.remove(key(5))

    def test_nothing_is_no_object(self, lasting_pool, open_one):
        backend = open_one(lasting_pool.url)
        assert put(backend, 4, 0) is False
        assert backend.get_into(key(4), memoryview(b"")) is None


@needs_mooncake
class TestApart:
    def test_prefixes_do_not_meet(self, lasting_pool, open_one):
        one, other = (open_one(f"{lasting_pool.url}?prefix={name}:") for name in ("one", "two"))
        put(one, 1)
        assert one.contains(key(1))
        assert not other.contains(key(1))

    def test_two_clients_share(self, lasting_pool, open_one):
        one, other = open_one(lasting_pool.url), open_one(lasting_pool.url)
        for n in range(10, 20):
            put(one, n)
        assert other.count_leading([key(n) for n in range(10, 25)]) == 10
        assert got(other, 15) == content(15, 1000)

    def test_many_keys_are_asked_for_in_several_round_trips(self, lasting_pool, open_one):
        backend = open_one(lasting_pool.url)
        put(backend, 20)
        assert backend.count_leading([key(20)] * 2500 + [key(9999)]) == 2500


@needs_mooncake
class TestContribution:
    def test_it_is_part_of_the_pool_while_it_is_open(self, new_master, open_one):
        master = new_master()
        part, other = open_one(f"{master.url}?segment=16MiB"), open_one(master.url)
        assert not part.capabilities.persistent
        assert not part.contains(key(1))  # it has to be connected
        assert put(other, 1)
        assert got(part, 1) == content(1, 1000)
        part.close()
        assert got(other, 1) is None
        assert put(other, 1) is False

    def test_it_goes_with_its_process(self, new_master, open_one):
        master = new_master()
        part, other = open_one(f"{master.url}?segment=16MiB"), open_one(master.url)
        assert put(part, 1)
        os.kill(client(part), signal.SIGKILL)
        with pytest.raises(BackendError, match="could not be moved"):
            got(other, 1)
        put_until_taken(part, 100)


def put_until_taken(backend: MooncakeBackend, first: int) -> None:
    """Put one object after the other; a pool that comes back takes one in the end, and keeps it."""
    for n in range(first, first + 100):
        if succeeds(lambda n=n: put(backend, n)):
            assert got(backend, n) == content(n, 1000)
            return
        time.sleep(0.2)
    raise AssertionError("the pool has not come back")


@needs_mooncake
class TestFailures:
    def test_the_master_may_come_and_go(self, new_pool, open_one):
        master, _ = new_pool()
        backend = open_one(f"{master.url}?timeout=2")
        put(backend, 1)
        master.kill()
        for call in (put, got):
            with pytest.raises(BackendError, match=f"127.0.0.1:{master.port} failed us"):
                call(backend, 1)
        master.start()
        put_until_taken(backend, 2)
        assert got(backend, 1) is None

    @pytest.mark.parametrize("who", ["the master", "the contributor", "the client"])
    def test_one_that_hangs_costs_the_timeout(self, new_pool, open_one, who):
        master, contributor = new_pool()
        backend = open_one(f"{master.url}?timeout=1")
        put(backend, 1)
        send = {
            "the master": master.signal,
            "the contributor": contributor.signal,
            "the client": lambda number: os.kill(client(backend), number),
        }[who]
        send(signal.SIGSTOP)
        for call in (put, got):
            started = time.monotonic()
            with pytest.raises(BackendError, match="no answer within 1 s"):
                call(backend, 1 if call is got else 2)
            assert time.monotonic() - started < 3
        send(signal.SIGCONT)
        wait_until(lambda: succeeds(lambda: got(backend, 1)))
        assert got(backend, 1) == content(1, 1000)

    def test_a_client_that_does_not_answer_any_more_is_replaced(self, lasting_pool, open_one):
        backend = open_one(f"{lasting_pool.url}?timeout=1&prefix=stuck:")
        put(backend, 1)
        before = client(backend)
        os.kill(before, signal.SIGSTOP)
        started = time.monotonic()
        answers = in_threads(LANES, lambda n: succeeds(lambda: put(backend, 10 + n)))
        assert answers == [False] * LANES
        assert time.monotonic() - started < 4
        with pytest.raises(BackendError, match="its client does not answer"):
            got(backend, 1)
        assert got(backend, 1) == content(1, 1000)
        assert not is_alive(before)

    def test_a_client_that_dies_is_replaced(self, lasting_pool, open_one):
        backend = open_one(f"{lasting_pool.url}?prefix=dying:")
        put(backend, 1)
        os.kill(client(backend), signal.SIGKILL)
        with pytest.raises(BackendError):
            got(backend, 1)
        assert got(backend, 1) == content(1, 1000)

    def test_what_lies_with_a_contributor_goes_with_it(self, new_pool, open_one):
        master, contributor = new_pool(client_ttl=2)
        backend = open_one(f"{master.url}?timeout=2")
        put(backend, 1)
        contributor.kill()
        with pytest.raises(BackendError, match="could not be moved"):
            got(backend, 1)
        wait_until(lambda: succeeds(lambda: put(backend, 2) is False))  # the pool is empty
        assert got(backend, 1) is None
        contributor.start()
        put_until_taken(backend, 3)

    def test_killed_under_load_it_shows_no_torn_object(self, new_pool, open_one):
        master, contributor = new_pool()
        backend = open_one(f"{master.url}?timeout=1")
        wrong, stop = [], threading.Event()

        def work(n):
            while not stop.is_set():
                n += LANES
                with suppress(BackendError):
                    put(backend, n, 200_000)
                    if got(backend, n) not in (None, content(n, 200_000)):
                        wrong.append(n)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for victim in (master.kill, lambda: os.kill(client(backend), signal.SIGKILL)):
            time.sleep(0.5)
            with suppress(AttributeError):  # it has none at that moment
                victim()
        contributor.kill()
        master.start()
        contributor.start()
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert wrong == []
        put_until_taken(backend, 1_000_000)

    def test_nobody_there(self, open_one):
        backend = open_one(NOBODY)  # which is no reason not to start
        with pytest.raises(BackendError, match="127.0.0.1:1 failed us: .*refused"):
            backend.contains(key(1))

    def test_one_that_says_nothing(self, open_one):
        with socket.create_server(("127.0.0.1", 0)) as mute:
            backend = open_one(f"mooncake://127.0.0.1:{mute.getsockname()[1]}?timeout=1")
            with pytest.raises(BackendError, match="no answer within 1 s"):
                backend.contains(key(1))

    def test_why_it_could_not_connect_is_told(self, lasting_pool, open_one):
        backend = open_one(f"{lasting_pool.url}?protocol=rdma&device=none")
        with pytest.raises(BackendError, match="could not connect: .*RNIC"):
            backend.contains(key(1))

    def test_a_metadata_server_may_be_used(self, tmp_path, open_one):
        port = free_port()
        master = Master(tmp_path, enable_http_metadata_server=True, http_metadata_server_port=port)
        server = f"http://127.0.0.1:{port}/metadata"
        contributor = Contributor(tmp_path, master, metadata_server=server)
        try:
            backend = open_one(f"{master.url}?metadata={server}")
            assert put(backend, 1)
            assert got(backend, 1) == content(1, 1000)
        finally:
            contributor.kill()
            master.kill()


def in_threads(count, call):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


@needs_mooncake
def test_its_process_ends_with_ours(lasting_pool):
    code = f"""
import sys
from lmcache.backends.mooncake import from_url
backend = from_url({lasting_pool.url!r})
backend.contains(bytes(32))
print(backend._process._process.pid, flush=True)
sys.stdin.read()
"""
    ours = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with ours:
        its = int(ours.stdout.readline())
        assert is_alive(its)
        ours.kill()
    wait_until(lambda: not is_alive(its))


@needs_mooncake
def test_closed_before_it_was_used():
    backend = from_url(NOBODY)
    backend.close()
    for call in (backend.contains, lambda _: backend.count_leading([])):
        with pytest.raises(BackendClosed):
            call(key(1))


@needs_mooncake
def test_closed_under_calls(lasting_pool, open_one):
    seen = []

    def work(backend, n):
        try:
            while True:
                put(backend, n, 100_000)
                got(backend, n)
        except Exception as error:
            seen.append(type(error))

    for _ in range(3):
        backend = open_one(f"{lasting_pool.url}?prefix=closed:")
        put(backend, 0)
        threads = [threading.Thread(target=work, args=(backend, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        backend.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert set(seen) == {BackendClosed}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mooncake:///x", "write mooncake://host:port"),
        ("mooncake://host/x", "write mooncake://host:port"),
        ("mooncake://host:0", "write mooncake://host:port"),
        ("mooncake://user:word@host", "write mooncake://host:port"),
        ("mooncake://host?protocol=udp", "option 'protocol': 'udp' is none of tcp, rdma"),
        ("mooncake://host?device=mlx5_0", "option 'device': it is for protocol=rdma"),
        ("mooncake://host?metadata=host:8080", "option 'metadata': write P2PHANDSHAKE, or"),
        ("mooncake://host?segment=16MB", "option 'segment': 16777216 bytes are the least"),
        ("mooncake://host?segment=much", "option 'segment': 'much' is not a size"),
        ("mooncake://host?buffer=1MB", "option 'buffer': 8388608 bytes are the least"),
        ("mooncake://host?timeout=0", "option 'timeout': '0' is not a whole number"),
        ("mooncake://host?segmnt=1GB", "did you mean 'segment'"),
    ],
)
def test_urls_that_make_no_sense(url, message):
    with pytest.raises(ConfigError, match=message):
        from_url(url)


def test_a_missing_package_is_named(monkeypatch):
    hidden = [path for path in sys.path if not Path(path, "mooncake").is_dir()]
    monkeypatch.setattr(sys, "path", hidden)
    with pytest.raises(ConfigError, match=r"pip install 'lmcache\[mooncake\]' .*No module named"):
        from_url(NOBODY)


def test_a_package_that_cannot_be_loaded_says_why(monkeypatch, tmp_path):
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "store.py").write_text("raise ImportError('libibverbs.so.1: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"libibverbs.so.1: not found"):
        from_url(NOBODY)


@needs_mooncake
def test_its_scheme():
    [spec] = lmcache_backends()
    assert spec.scheme == "mooncake"
    assert spec.open(NOBODY).capabilities.persistent


@pytest.mark.skipif("LMCACHE_TEST_SERVERS" not in os.environ, reason="not asked for")
def test_it_is_there():
    """Where all of the tests are meant to run, none of them may be skipped unseen."""
    assert WHY_NOT == ""
