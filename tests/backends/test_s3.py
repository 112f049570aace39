from __future__ import annotations

import builtins
import hashlib
import os
import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from s3_server import BUCKET, DOMAIN, KEY_ID, SECRET, S3Server, needs_s3

from lmcache.backends.bucket import Bucket
from lmcache.backends.s3 import S3Backend, lmcache_backends
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.testing import BackendSuite

MIB = 1 << 20
PART = 5 * MIB
NOBODY = "s3://key:secret@bucket?endpoint=http://127.0.0.1:1&timeout=1"


@pytest.fixture(autouse=True)
def nothing_from_the_shell(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.end()


@pytest.fixture
def mortal_server(tmp_path):
    server = S3Server(tmp_path)
    yield server
    server.end()


@pytest.fixture
def open_one():
    opened = []

    def open_one(url, more=""):
        opened.append(S3Backend.from_url(url + more))
        return opened[-1]

    yield open_one
    for backend in opened:
        backend.close()


def key(n: int) -> bytes:
    return hashlib.sha256(b"%d" % n).digest()


def content(n: int, size: int) -> bytes:
    return random.Random(n).randbytes(size)


def put(backend: S3Backend, n: int, size: int = 1000) -> bool:
    return backend.put(key(n), memoryview(content(n, size)))


def got(backend: S3Backend, n: int, room: int = MIB) -> bytes | None:
    out = memoryview(bytearray(room))
    size = backend.get_into(key(n), out)
    return None if size is None else bytes(out[:size])


def succeeds(call):
    try:
        return call()
    except BackendError:
        return False


@needs_s3
class TestS3(BackendSuite):
    @pytest.fixture
    def url(self, server):
        return server.url


@needs_s3
class TestOneRequestAtATime(BackendSuite):
    @pytest.fixture
    def url(self, server):
        return f"{server.url}&concurrency=1&region=eu-central-1"


@needs_s3
class TestParts:
    """An object at every size where the way it is sent or read changes."""

    @pytest.fixture
    def backend(self, server, open_one):
        return open_one(server.url, f"&part_size={PART}")

    @pytest.mark.parametrize("parts", [1, 2, 3])
    @pytest.mark.parametrize("more", [-1, 0, 1])
    def test_every_byte_comes_back(self, backend, parts, more):
        size = parts * PART + more
        data = content(size, size)
        assert backend.put(key(size), memoryview(data)) is True
        for room in {size, size + 1, 4 * PART}:
            out = memoryview(bytearray(b"\xa5" * room))
            assert backend.get_into(key(size), out) == size
            assert out[:size] == data
            assert out[size:] == b"\xa5" * (room - size)
        small = memoryview(bytearray(size - 1))
        assert backend.get_into(key(size), small) is None
        assert small == bytes(size - 1)
        assert backend.remove(key(size)) is True

    def test_an_object_of_nothing(self, backend):
        assert backend.put(key(0), memoryview(b"")) is True
        assert backend.contains(key(0))
        for room in (0, 10, 2 * PART):
            assert backend.get_into(key(0), memoryview(bytearray(room))) == 0

    def test_a_part_larger_than_what_another_client_sent(self, server, backend, open_one):
        put(backend, 1, 3 * PART)
        assert got(open_one(server.url, "&part_size=1GiB"), 1, 3 * PART) == content(1, 3 * PART)

    def test_nobody_holds_the_callers_buffer_any_more(self, backend):
        for size in (1000, PART, 2 * PART + 1):
            data = memoryview(bytearray(size))
            backend.put(key(size), data)
            data.release()  # raises if somebody does

    def test_an_upload_that_fails_is_aborted(self, server):
        server.say("POST", f"/{BUCKET}/left", "uploads=")
        bucket = Disturbed.open(server)
        with pytest.raises(BackendError, match="EntityTooSmall"):
            bucket.put("x", memoryview(bytes(2 * PART)), part_size=PART // 2, at_once=4)
        assert server.uploads() == ["left"]
        assert not bucket.has("x")


class Disturbed(Bucket):
    """A bucket with which one of `events` happens each time that something has been asked for."""

    @classmethod
    def open(cls, server, *events, timeout_s=5):
        credentials = KEY_ID, SECRET
        bucket = cls(BUCKET, timeout_s=timeout_s, endpoint=server.endpoint, credentials=credentials)
        bucket.events = list(events)
        return bucket

    def get(self, *args, **options):
        answer = super().get(*args, **options)
        if self.events:
            self.events.pop(0)()
        return answer


@needs_s3
class TestReplaced:
    SIZE = 3 * PART

    def reader(self, server, *events):
        return S3Backend(Disturbed.open(server, *events), prefix="replaced", part_size=PART)

    @pytest.fixture
    def replace(self, server, open_one):
        url = server.url.replace("/some/where", "/replaced")
        writer = open_one(url, f"&part_size={PART}")
        return lambda n: writer.put(key(1), memoryview(content(n, self.SIZE)))

    def test_by_another_object_that_one_is_read(self, server, replace):
        replace(1)
        with self.reader(server, lambda: replace(2)) as reader:
            assert got(reader, 1, self.SIZE) == content(2, self.SIZE)
            assert reader.get_into(key(1), memoryview(bytearray(self.SIZE))) == self.SIZE

    def test_again_and_again_none_is_read(self, server, replace):
        replace(1)
        others = [lambda n=n: replace(n) for n in range(50)]
        with self.reader(server, *others) as reader:
            with pytest.raises(BackendError, match="another object"):
                got(reader, 1, self.SIZE)

    def test_by_nothing_it_is_absent(self, server, replace, open_one):
        replace(1)
        other = open_one(server.url.replace("/some/where", "/replaced"))
        with self.reader(server, lambda: other.remove(key(1))) as reader:
            assert got(reader, 1, self.SIZE) is None

    def test_under_way_no_two_are_mixed(self, server, replace, open_one):
        stop, seen = threading.Event(), []
        replace(0)

        def write():
            n = 0
            while not stop.is_set():
                n += 1
                replace(n % 3)

        writer = threading.Thread(target=write)
        writer.start()
        contents = [content(n, self.SIZE) for n in range(3)]
        try:
            with self.reader(server) as reader:
                deadline = time.monotonic() + 10
                while len(seen) < 10 and time.monotonic() < deadline:
                    data = succeeds(lambda: got(reader, 1, self.SIZE))
                    assert data is False or data in contents
                    seen += [data] if data else []
        finally:
            stop.set()
            writer.join(30)


@needs_s3
class TestNames:
    def test_they_have_the_digits_of_the_key(self, server, open_one):
        url = server.url.replace("/some/where", "/a%20b/%C3%BC+c%25/")
        put(open_one(url), 1)
        digits = key(1).hex()
        assert f"a b/\u00fc+c%/{digits[:2]}/{digits}" in server.names()
        assert got(open_one(url), 1) is not None

    def test_prefixes_do_not_meet(self, server, open_one):
        put(open_one(server.url.replace("/some/where", "/one")), 1)
        assert not open_one(server.url.replace("/some/where", "/two")).contains(key(1))
        assert not open_one(server.url.replace("/some/where", "")).contains(key(1))

    def test_the_bucket_may_be_in_the_name_of_the_host(self, server, open_one, monkeypatch):
        monkeypatch.setenv("HTTP_PROXY", server.endpoint)  # nobody else knows that host
        url = server.url.replace(server.endpoint, f"http://{DOMAIN}")
        assert put(open_one(url, "&virtual_hosted=true"), 12)
        monkeypatch.delenv("HTTP_PROXY")
        assert got(open_one(server.url), 12) == content(12, 1000)

    def test_two_clients_share(self, server, open_one):
        one, two = open_one(server.url), open_one(server.url)
        put(one, 11)
        assert got(two, 11) == content(11, 1000)
        assert two.remove(key(11))
        assert not one.contains(key(11))

    def test_many_are_counted_up_to_a_gap(self, server, open_one):
        backend = open_one(server.url.replace("/some/where", "/many"))
        for n in range(200):
            if n != 150:
                put(backend, n, 10)
        names = [key(n) for n in range(200)]
        assert backend.count_leading(names) == 150
        assert backend.count_leading(names[151:]) == 49


@needs_s3
class TestFailures:
    def test_the_store_may_come_and_go(self, mortal_server, open_one):
        server = mortal_server
        backend = open_one(server.url, "&timeout=20")
        put(backend, 1)
        server.kill()
        for call in (put, got):
            with pytest.raises(
                BackendError, match=f"127.0.0.1:{server.port} failed us: Connection refused"
            ):
                call(backend, 1)
        with pytest.raises(BackendError):
            backend.count_leading([key(n) for n in range(100)])
        server.start()
        assert put(backend, 2)
        assert got(backend, 1) == content(1, 1000)

    @pytest.mark.parametrize("size", [1000, 3 * PART])
    def test_a_store_that_hangs_costs_a_few_timeouts(self, mortal_server, open_one, size):
        server = mortal_server
        put(open_one(server.url), 1, size)
        backend = open_one(server.url, f"&part_size={PART}&timeout=1")
        server.signal(signal.SIGSTOP)
        names = [key(n) for n in range(1000)]
        calls = [
            lambda: put(backend, 2, size),
            lambda: got(backend, 1, size),
            lambda: backend.contains(key(1)),
            lambda: backend.count_leading(names),
            lambda: backend.remove(key(1)),
        ]
        for call in calls:
            started = time.monotonic()
            with pytest.raises(BackendError, match="failed us: TimedOut"):
                call()
            assert time.monotonic() - started < 3
        server.signal(signal.SIGCONT)
        deadline = time.monotonic() + 20
        while succeeds(lambda: got(backend, 1, size)) != content(1, size):
            assert time.monotonic() < deadline

    def test_one_that_hangs_under_way(self, mortal_server, open_one):
        server = mortal_server
        put(open_one(server.url.replace("/some/where", "")), 1, 3 * PART)
        bucket = Disturbed.open(server, lambda: server.signal(signal.SIGSTOP), timeout_s=1)
        with S3Backend(bucket, part_size=PART) as backend:
            started = time.monotonic()
            with pytest.raises(BackendError, match="TimedOut"):
                got(backend, 1, 3 * PART)
            assert time.monotonic() - started < 3

    def test_killed_under_load_it_shows_no_torn_object(self, mortal_server, open_one):
        server = mortal_server
        backend = open_one(server.url, f"&part_size={PART}&timeout=3")
        sizes = (200_000, 2 * PART + 1)
        wrong, stop = [], threading.Event()

        def work(first):
            n = first
            while not stop.is_set():
                n += 4
                size = sizes[n // 4 % 2]
                try:
                    put(backend, n, size)
                    data = got(backend, n, size)
                except BackendError:
                    continue
                if data not in (None, content(n, size)):
                    wrong.append(n)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            time.sleep(1)
            server.kill()
            server.start()
        stop.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert wrong == []
        assert put(backend, 0)

    def test_nobody_there(self, open_one):
        backend = open_one(NOBODY)  # which is no reason not to start
        with pytest.raises(BackendError, match="the bucket bucket at http://127.0.0.1:1 failed us"):
            backend.contains(key(1))

    def test_a_bucket_that_is_not_there(self, server, open_one):
        backend = open_one(server.url.replace(BUCKET, "no-such-bucket"))
        for call in (put, got):
            with pytest.raises(BackendError, match="NoSuchBucket"):
                call(backend, 1)


@needs_s3
class TestCredentials:
    def test_of_the_environment(self, server, open_one, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        assert put(open_one(f"s3://{BUCKET}"), 1)

    def test_those_of_the_url_win(self, server, open_one, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guess")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "guess")
        assert put(open_one(server.url), 1)

    @pytest.mark.parametrize("user", [KEY_ID, "nobody-known"])
    def test_wrong_ones_are_told_and_never_shown(self, server, open_one, user):
        backend = open_one(f"s3://{user}:my-guess@{BUCKET}?endpoint={server.endpoint}")
        calls = (put, got, lambda b, n: b.contains(key(n)), lambda b, n: b.remove(key(n)))
        for call in calls:
            with pytest.raises(BackendError) as caught:
                call(backend, 1)
            shown = f"{caught.value!r} {backend!r} {vars(backend)!r} {vars(backend._bucket)!r}"
            assert "my-guess" not in shown
            assert user not in shown
            assert caught.value.__suppress_context__


class Canned(BaseHTTPRequestHandler):
    """Gives one answer to everything, as no server here can be made to."""

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.text)))
        self.end_headers()
        self.wfile.write(self.server.text.encode())

    def do_GET(self):
        """The beginning of an object whose content has no name."""
        self.send_response(206)
        self.send_header("Content-Length", str(PART))
        self.send_header("Content-Range", f"bytes 0-{PART - 1}/{2 * PART}")
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 17:00:00 GMT")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def answering(open_one):
    """Opens a backend whose store always gives that answer."""
    servers = []

    def answering(status, text):
        server = HTTPServer(("127.0.0.1", 0), Canned)
        server.status, server.text = status, text
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return open_one(f"s3://key:secret@bucket?part_size={PART}&endpoint={endpoint}")

    yield answering
    for server in servers:
        server.shutdown()
        server.server_close()


class TestAnswers:
    @pytest.mark.parametrize(
        ("status", "code"),
        [(507, "XMinioStorageFull"), (403, "QuotaExceeded"), (400, "EntityTooLarge")],
    )
    def test_no_room_is_a_refusal(self, answering, status, code):
        backend = answering(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>")
        assert put(backend, 1) is False

    def test_a_token_that_is_repeated_to_us_is_not_shown(self, answering):
        text = "<Error><Code>InvalidToken</Code><Message>The provided token is malformed.</Message>"
        backend = answering(400, f"{text}<Token-0>my-token</Token-0></Error>")
        with pytest.raises(BackendError) as caught:
            put(backend, 1)
        assert str(caught.value).endswith("InvalidToken: The provided token is malformed.")

    def test_parts_that_may_be_of_two_objects_are_not_read(self, answering):
        with pytest.raises(BackendError, match="the store gives an object no ETag"):
            got(answering(200, ""), 1, 2 * PART)

    def test_one_that_is_not_of_the_protocol(self, answering):
        with pytest.raises(BackendError, match="failed us: 418 I'm a teapot$"):
            put(answering(418, "my-token"), 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3:///prefix", "write s3://bucket/prefix"),
        ("s3://bucket:9000/prefix", "write s3://bucket/prefix, and ?endpoint="),
        ("s3://b$cket", "write s3://bucket/prefix"),
        (
            "s3://bucket/a//b",
            "'a//b' is no prefix; write words with single slashes between them, 900 bytes",
        ),
        ("s3://bucket/a/../b", "is no prefix"),
        ("s3://bucket/%00", "malformed URL"),
        ("s3://bucket/%0a", "is no prefix"),
        ("s3://bucket/%ff", "is no prefix"),
        (f"s3://bucket/{'x' * 901}", "is no prefix"),
        ("s3://key@bucket", "a URL with an access key has its secret, too"),
        ("s3://:my-guess@bucket", "a URL with an access key has its secret, too"),
        ("s3://bucket?endpoint=host:9000", "malformed URL"),
        ("s3://bucket?endpoint=ftp://host", "the endpoint of a store of objects is https://"),
        ("s3://bucket?endpoint=http://u:my-guess@host", "the endpoint of a store of objects is"),
        ("s3://bucket?endpoint=http://host", "no credentials for http://host: set AWS_ACCESS_KEY"),
        ("s3://bucket?part_size=4MiB", "option 'part_size': S3 takes parts of 5MiB to 5GiB"),
        ("s3://bucket?part_size=0", "S3 takes parts of 5MiB to 5GiB"),
        ("s3://bucket?part_size=6GiB", "S3 takes parts of 5MiB to 5GiB"),
        ("s3://bucket?part_size=lots", "option 'part_size': 'lots' is not a size"),
        ("s3://bucket?timeout=0", "option 'timeout': '0' is not a whole number"),
        ("s3://bucket?concurrency=-1", "option 'concurrency': '-1' is not"),
        ("s3://bucket?virtual_hosted=yes", "option 'virtual_hosted': 'yes' is neither"),
        ("s3://bucket?secret_access_key=my-guess", "unknown option 'secret_access_key'"),
        ("s3://bucket?endpont=http://host", "did you mean 'endpoint'"),
    ],
)
def test_urls_that_make_no_sense(url, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        S3Backend.from_url(url)
    assert "my-guess" not in str(caught.value)


def test_a_key_without_its_secret_in_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(ConfigError, match="the bucket bucket cannot be used: .*Missing"):
        S3Backend.from_url("s3://bucket")


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without_obstore(name, *args, **kwargs):
        if name.split(".")[0] == "obstore":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_obstore)
    with pytest.raises(ConfigError, match=r"pip install 'lmcache\[s3\]'"):
        S3Backend.from_url("s3://bucket")


def test_closed_before_it_was_used():
    backend = S3Backend.from_url(NOBODY)
    backend.close()
    for call in (backend.contains, lambda _: backend.count_leading([])):
        with pytest.raises(BackendClosed):
            call(key(1))


@needs_s3
def test_closed_under_calls(server):
    seen = []

    def work(backend, n):
        try:
            while True:
                put(backend, n)
                backend.count_leading([key(n)] * 10)
        except Exception as error:
            seen.append(type(error))

    for _ in range(5):
        backend = S3Backend.from_url(server.url)
        threads = [threading.Thread(target=work, args=(backend, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        backend.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert set(seen) == {BackendClosed}


def test_its_scheme():
    assert [spec.scheme for spec in lmcache_backends()] == ["s3"]


@pytest.mark.skipif("LMCACHE_TEST_SERVERS" not in os.environ, reason="not asked for")
def test_the_server_is_there():
    """Where all of the tests are meant to run, none of them may be skipped unseen."""
    assert needs_s3.args == (False,)
