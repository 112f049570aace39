"""Messages over a stream socket: whole and in order however they arrive, and bounded."""

from __future__ import annotations

import re
import socket
import struct
import threading
from contextlib import suppress

import pytest
import rig
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.core.errors import ServiceError
from lmcache.core.service import stream as streams
from lmcache.core.service.stream import FAITH, READ_BYTES, Stream, connect, parse_endpoint
from lmcache.core.service.wire import MAX_MESSAGE


def pair():
    """Both ends of a connection: a stream, and the bare socket of who may say anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream = connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}", 5.0)
        sock, _ = listener.accept()
    return stream, sock


@pytest.fixture
def ends():
    stream, sock = pair()
    yield stream, sock
    stream.close()
    sock.close()


@pytest.fixture
def meanwhile():
    """Has something done on a thread, which ends with the test."""
    threads = []

    def meanwhile(what):
        threads.append(threading.Thread(target=what))
        threads[-1].start()

    yield meanwhile
    for thread in threads:
        thread.join()


def framed(*messages):
    return b"".join(struct.pack("<I", len(message)) + message for message in messages)


def taken(stream, count):
    """The next messages; they are copied, as what they lie in is used again."""
    found = []
    while len(found) < count:
        stream.wait(5.0)
        assert stream.read(), "nothing arrives"
        while (message := stream.take()) is not None:
            found.append(bytes(message))
    return found


class TestReceiving:
    @settings(max_examples=60, deadline=None)
    @given(
        sizes=st.lists(
            st.sampled_from([0, 1, 3, 100, READ_BYTES - 4, READ_BYTES, 3 * READ_BYTES + 1]),
            min_size=1,
            max_size=6,
        ),
        cuts=st.lists(st.integers(1, 4 * READ_BYTES), max_size=6),
    )
    def test_however_it_is_cut(self, sizes, cuts):
        messages = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
        data = framed(*messages)
        stream, sock = pair()
        try:
            found, at = [], 0
            for cut in [*cuts, len(data)]:
                # no more than the kernel takes without our reading
                for start in range(at, min(at + cut, len(data)), READ_BYTES):
                    part = data[start : min(start + READ_BYTES, at + cut)]
                    sock.sendall(part)
                    while stream.read():
                        while (message := stream.take()) is not None:
                            found.append(bytes(message))
                at = min(at + cut, len(data))
            found += taken(stream, len(messages) - len(found))
            assert found == messages
            assert stream.take() is None
        finally:
            stream.close()
            sock.close()

    def test_nothing_is_there(self, ends):
        stream, _ = ends
        assert not stream.read()
        assert stream.take() is None

    def test_what_came_before_the_end_is_not_lost(self, ends):
        stream, sock = ends
        sock.sendall(framed(b"a", b"b") + b"\x09\0\0\0half")
        sock.close()
        assert taken(stream, 2) == [b"a", b"b"]
        with pytest.raises(ServiceError, match="has left"):
            rig.wait_until(lambda: not stream.read())

    def test_a_message_that_is_too_large(self, ends):
        stream, sock = ends
        sock.sendall(struct.pack("<I", MAX_MESSAGE + 1))
        stream.wait(5.0)
        assert stream.read()
        with pytest.raises(ServiceError, match=f"{MAX_MESSAGE + 1} bytes is over {MAX_MESSAGE}"):
            stream.take()
        with pytest.raises(ServiceError, match="is over"):
            stream.read()

    def test_another_protocol_is_told_from_ours_at_once(self, ends):
        stream, sock = ends
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        stream.wait(5.0)
        assert stream.read()
        with pytest.raises(ServiceError, match="is over"):
            stream.take()

    def test_memory_follows_what_was_sent_not_what_was_announced(self, ends):
        stream, sock = ends
        sock.sendall(struct.pack("<I", MAX_MESSAGE) + b"x" * 100_000)
        for _ in range(20):
            stream.wait(0.01)
            stream.read()
        assert len(stream._buffer) <= FAITH * 100_004

    def test_a_large_buffer_is_not_kept(self, ends, meanwhile):
        stream, sock = ends
        message = bytes(streams.KEPT_BYTES + 1)
        meanwhile(lambda: sock.sendall(framed(message)))
        assert taken(stream, 1) == [message]
        assert len(stream._buffer) > streams.KEPT_BYTES
        sock.sendall(framed(b"small"))
        assert taken(stream, 1) == [b"small"]
        assert len(stream._buffer) == READ_BYTES


class TestSending:
    def test_what_is_not_taken_waits(self, ends):
        stream, sock = ends
        messages = [bytes([n]) * (1 << 20) for n in range(16)]
        for message in messages:
            stream.send(message)
        assert stream.is_behind
        other = Stream(sock)
        found = []
        while len(found) < len(messages):
            stream.flush()
            while other.read():
                while (message := other.take()) is not None:
                    found.append(bytes(message))
        assert found == messages
        assert not stream.is_behind

    def test_waiting_ends_when_more_can_be_sent(self, ends, meanwhile):
        stream, sock = ends
        while not stream.is_behind:
            stream.send(bytes(1 << 20))
        left = len(stream._unsent)

        def drain():
            with suppress(OSError):
                while sock.recv(1 << 20):
                    pass

        meanwhile(drain)
        try:
            while len(stream._unsent) == left:
                stream.wait(5.0)
                stream.flush()
        finally:
            sock.shutdown(socket.SHUT_RDWR)  # the thread's last reading returns

    def test_who_is_too_far_behind_is_lost(self, ends, monkeypatch):
        stream, _ = ends
        monkeypatch.setattr(streams, "MAX_BEHIND", 1 << 20)
        while len(stream._unsent) < (1 << 20) - (1 << 18):
            stream.send(bytes(1 << 17))
        with pytest.raises(ServiceError, match=f"more than {1 << 20} bytes wait"):
            stream.send(bytes(1 << 18 | 1))
        assert len(stream._unsent) <= 1 << 20

    @pytest.mark.parametrize("what", ["send", "flush"])
    def test_the_other_side_has_left(self, ends, what):
        stream, sock = ends
        while what == "flush" and not stream.is_behind:
            stream.send(bytes(1 << 20))
        sock.close()

        def sends():
            stream.flush() if what == "flush" else stream.send(b"x")

        with pytest.raises(ServiceError, match="cannot send"):
            rig.wait_until(sends)


class TestEndpoints:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("tcp://127.0.0.1:5555", ("127.0.0.1", 5555)),
            ("tcp://localhost:0", ("localhost", 0)),
            ("tcp://[::1]:1", ("::1", 1)),
        ],
    )
    def test_addresses(self, text, address):
        assert parse_endpoint(text) == address

    @pytest.mark.parametrize(
        "text",
        [
            "localhost:5555",
            "ipc:///tmp/x",
            "tcp://localhost",
            "tcp://:5555",
            "tcp://localhost:x",
            "tcp://localhost:*",
            "tcp://localhost:65536",
            "tcp://localhost:1/x",
            "tcp://u:p@localhost:1",
            "tcp://[::1",
            "",
        ],
    )
    def test_what_is_no_address(self, text):
        with pytest.raises(ServiceError, match=re.escape(f"{text} is no address of the form tcp:")):
            parse_endpoint(text)

    def test_a_name_that_cannot_be(self):
        with pytest.raises(ServiceError, match="no server listens on"):
            connect(f"tcp://{'a' * 300}.invalid:1", 1.0)
