"""Two processes share a slab, notice each other's death, and trust nothing they receive."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress

import msgspec
import pytest
import rig

from lmcache.core.errors import HandoverError
from lmcache.core.frames import MAX_MESSAGE
from lmcache.core.handover import (
    PROTOCOL,
    Door,
    Grant,
    Hello,
    Visit,
    address_of,
)
from lmcache.core.slab import CONTROL_BYTES, Slab

NOTICE_S = 2.0
GRANT = {
    "attachment": 7,
    "word": 0,
    "pages_per_chunk": rig.PAGES_PER_CHUNK,
    "slices": (rig.PAGE_BYTES,),
    "layout": bytes(32),
    "writes": True,
}

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")


class House:
    """A door in this process, and the slabs that came through it."""

    def __init__(self, workshop, *, impatient=False, number=0):
        self.address = address_of(rig.engine_id(), number)
        self.slabs = []
        self.error = None
        kind = type("Impatient", (Door,), {"GRANT_S": 0.2}) if impatient else Door
        self.left = 0
        self.door = kind(self.address, rig.hello(number), self.granted, self.leave)
        workshop.later(self.close)

    def granted(self, grant, fds):
        [fd] = fds
        slab = Slab(fd, grant.slab_bytes)
        if self.error:
            slab.close()
            raise self.error("on purpose")
        self.slabs.append(slab)

    def leave(self):
        self.left += 1

    def close(self):
        self.door.close()
        for slab in self.slabs:
            slab.close()


@pytest.fixture
def house(workshop):
    return House(workshop)


@pytest.fixture
def slab(workshop):
    made = Slab.create(1 << 17)
    workshop.later(made.close)
    return made


@pytest.fixture
def visit(workshop):
    def make(address, timeout_s=5.0):
        made = Visit(address, timeout_s)
        workshop.later(made.close)
        return made

    return make


def grant_for(slab):
    return Grant(slab_bytes=slab.size, **GRANT)


def frame(message):
    body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    return struct.pack("<I", len(body)) + body


def descriptors():
    return len(os.listdir("/proc/self/fd"))


class TestOneProcess:
    def test_the_slab_is_shared(self, house, slab, visit):
        one = visit(house.address)
        assert one.hello == rig.hello()
        one.grant(grant_for(slab), slab.fd)
        [other] = house.slabs
        slab.view[5000:5005] = b"hello"
        other.write_word(4096, 7)
        assert other.view[5000:5005] == b"hello"
        assert slab.read_word(4096) == 7
        assert other.fd != slab.fd
        assert one.is_alive()

    def test_what_is_received_is_not_inherited_by_children(self, house, slab, visit):
        visit(house.address).grant(grant_for(slab), slab.fd)
        assert not os.get_inheritable(house.slabs[0].fd)

    def test_the_door_serves_one_decider_after_the_other(self, house, slab, visit):
        for turn in range(5):
            one = visit(house.address)
            one.grant(grant_for(slab), slab.fd)
            assert len(house.slabs) == turn + 1
            one.close()

    def test_the_next_decider_waits_its_turn(self, house, slab, visit):
        first = visit(house.address)
        first.grant(grant_for(slab), slab.fd)
        with pytest.raises(HandoverError, match="no mover answers: timed out"):
            Visit(house.address, 0.1)
        first.close()
        visit(house.address).grant(grant_for(slab), slab.fd)

    def test_a_decider_that_leaves_without_a_grant(self, house, slab, visit):
        for _ in range(3):
            visit(house.address).close()
        visit(house.address).grant(grant_for(slab), slab.fd)
        assert len(house.slabs) == 1

    def test_closing_the_door_is_noticed(self, house, slab, visit):
        one = visit(house.address)
        one.grant(grant_for(slab), slab.fd)
        house.door.close()
        rig.wait_until(lambda: not one.is_alive(), NOTICE_S)

    def test_nobody_answers_at_a_closed_door(self, house):
        house.door.close()
        with pytest.raises(HandoverError, match="no mover answers"):
            Visit(house.address, 1.0)

    def test_a_closed_door_can_be_replaced_at_once(self, house, visit):
        house.door.close()
        again = Door(house.address, rig.hello(5), house.granted, house.leave)
        assert visit(house.address).hello.number == 5
        again.close()
        again.close()

    def test_two_doors_at_one_address(self, house):
        with pytest.raises(HandoverError, match="cannot listen for the decider"):
            Door(house.address, rig.hello(), house.granted, house.leave)

    def test_the_grant_is_taken_before_it_is_answered(self, house, slab, visit):
        """So that no step is sent to a mover that has no slab yet."""
        granted = house.granted

        def slowly(grant, fd):
            time.sleep(0.2)
            granted(grant, fd)

        house.door._granted = slowly
        visit(house.address).grant(grant_for(slab), slab.fd)
        assert len(house.slabs) == 1

    def test_two_engines(self, workshop, visit):
        houses = [House(workshop) for _ in range(2)]
        slabs = [Slab.create(1 << 16) for _ in houses]
        for number, (house, slab) in enumerate(zip(houses, slabs, strict=True)):
            visit(house.address).grant(grant_for(slab), slab.fd)
            slab.write_word(4096, number + 1)
        assert [house.slabs[0].read_word(4096) for house in houses] == [1, 2]
        for slab in slabs:
            slab.close()

    def test_no_thread_and_no_descriptor_is_left(self, workshop, slab):
        before = descriptors()
        house = House(workshop)
        one = Visit(house.address, 5.0)
        one.grant(grant_for(slab), slab.fd)
        one.close()
        house.close()
        assert descriptors() == before
        assert not [t for t in threading.enumerate() if t.name == "lmcache-door"]


class TestAddresses:
    def test_they_differ_by_engine_and_number(self):
        names = [address_of(engine, number) for engine in ("a", "b", "a/1") for number in range(12)]
        assert len(set(names)) == len(names)

    def test_they_are_short_whatever_the_engine_is_called(self):
        assert len(address_of("x" * 10_000 + "/../é\0", 3)) < 100

    @pytest.mark.skipif(not os.path.exists("/proc/net/unix"), reason="Linux only")
    def test_no_file_is_made(self, house):
        assert house.address.startswith("\0")


class TestTwoProcesses:
    @pytest.fixture
    def engine(self):
        return rig.engine_id()

    @pytest.fixture
    def mover(self, workshop, engine):
        return workshop.process("mover", engine, 0, 0).ready()

    def test_pages_and_words_cross(self, mover, engine, slab, visit):
        one = visit(address_of(engine, 0))
        assert one.hello.pid == mover.pid
        one.grant(grant_for(slab), slab.fd)
        sequence = rig.tokens(rig.CHUNK_TOKENS)
        mover.do("compute", tokens=sequence, table=[0, 1, 2, 3])
        mover.do("store", moves=[[CONTROL_BYTES, 99, 4, 0, [0, 1, 2, 3]]], step=5)
        assert slab.read_word(0) == 5
        geometry = rig.geometry()
        assert slab.read_word(CONTROL_BYTES + geometry.tag_offset(0)) == 99
        start = CONTROL_BYTES + geometry.payload_offset(0, 4)
        stored = bytes(slab.view[start : start + 4 * rig.PAGE_BYTES])
        pages = b"".join(rig.content(sequence, page) for page in range(4))
        assert sorted(stored) == sorted(pages)
        slab.write_word(8192, 2**64 - 1)
        assert mover.do("word", offset=8192) == 2**64 - 1
        mover.do("poison")
        assert mover.do("load", moves=[[CONTROL_BYTES, 99, 4, 0, [7, 6, 5, 4]]]) == []
        assert mover.do("wrong", tokens=sequence, table=[7, 6, 5, 4], stop=16) == []

    def test_a_killed_mover_is_noticed(self, mover, engine, slab, visit):
        one = visit(address_of(engine, 0))
        one.grant(grant_for(slab), slab.fd)
        assert one.is_alive()
        mover.kill()
        rig.wait_until(lambda: not one.is_alive(), NOTICE_S)
        with pytest.raises(HandoverError, match="no mover answers"):
            Visit(address_of(engine, 0), 1.0)

    def test_a_mover_killed_before_its_grant(self, mover, engine, slab, visit):
        one = visit(address_of(engine, 0))
        mover.kill()
        with pytest.raises(HandoverError, match="the mover"):
            one.grant(grant_for(slab), slab.fd)

    def test_a_mover_that_is_stopped_is_alive_and_answers_nobody(self, mover, engine):
        mover.stop()
        with pytest.raises(HandoverError, match="no mover answers: timed out"):
            Visit(address_of(engine, 0), 0.2)
        mover.go_on()

    def test_a_mover_that_is_stopped_is_not_taken_for_dead(self, mover, engine, slab, visit):
        one = visit(address_of(engine, 0))
        one.grant(grant_for(slab), slab.fd)
        mover.stop()
        assert one.is_alive(), "it may wake up and write to the slab"
        mover.go_on()
        assert mover.do("grants") == 1

    def test_a_killed_decider_is_noticed(self, workshop, engine, slab, visit):
        slabs = []

        def granted(grant, fds):
            [fd] = fds
            slabs.append(Slab(fd, grant.slab_bytes))

        door = Door(address_of(engine, 0), rig.hello(), granted, lambda: None)
        workshop.later(door.close)
        decider = workshop.process("decider", engine, 1).ready()
        decider.do("write_word", offset=8192, value=42)
        assert slabs[0].read_word(8192) == 42
        decider.kill()
        visit(address_of(engine, 0), NOTICE_S).grant(grant_for(slab), slab.fd)
        slab.write_word(8192, 43)
        assert [each.read_word(8192) for each in slabs] == [42, 43], "the old one is still mapped"
        for each in slabs:
            each.close()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
    def test_another_user_is_turned_away(self, house, slab, visit):
        program = (
            "import os, socket, sys; os.setuid(65534); sock = socket.socket(socket.AF_UNIX);"
            "sock.connect(bytes.fromhex(sys.argv[1])); print(sock.recv(100))"
        )
        answer = subprocess.run(
            [sys.executable, "-c", program, house.address.encode().hex()],
            check=True,
            capture_output=True,
            text=True,
        )
        assert answer.stdout == "b''\n", answer.stderr
        visit(house.address).grant(grant_for(slab), slab.fd)

    def test_a_mover_that_comes_back_has_the_same_address(self, workshop, mover, engine, visit):
        visit(address_of(engine, 0))
        mover.kill()
        again = workshop.process("mover", engine, 0, 0).ready()
        assert visit(address_of(engine, 0)).hello.pid == again.pid


def raw(address):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(address)
    return sock


def drain(sock):
    """Read until the other side closes."""
    sock.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        while sock.recv(4096):
            pass


NOISE = {
    "too long": struct.pack("<I", MAX_MESSAGE + 1) + b"x" * 100,
    "as long as can be said": struct.pack("<I", 2**32 - 1),
    "no message": struct.pack("<I", 0),
    "half a length": b"\1\0",
    "cut short": struct.pack("<I", 100) + b"x" * 50,
    "not msgpack": frame(b"\xc1" * 40),
    "another message": frame(rig.hello()),
    "wrong types": frame({"slab_bytes": "1", **GRANT}),
    "missing fields": frame({"slab_bytes": 1}),
    "a list": frame([1, 2, 3]),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


class TestGarbageAtTheDoor:
    @pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
    def test_it_is_refused_and_the_next_is_served(self, workshop, slab, visit, noise):
        house = House(workshop, impatient=True)
        with raw(house.address) as sock:
            assert sock.recv(4)
            sock.sendall(noise)
            drain(sock)
        visit(house.address).grant(grant_for(slab), slab.fd)
        assert len(house.slabs) == 1

    def test_a_grant_without_a_descriptor(self, house, slab, visit):
        with raw(house.address) as sock:
            sock.sendall(frame(grant_for(slab)))
            drain(sock)
        assert house.slabs == []
        visit(house.address).grant(grant_for(slab), slab.fd)

    @pytest.mark.parametrize("valid", [True, False])
    def test_descriptors_that_come_with_it_are_closed(self, workshop, slab, valid):
        """Two where there should be one, or one with a message that means nothing."""
        house = House(workshop, impatient=True)
        fds = array.array("i", [slab.fd] * (1 + valid))
        message = frame(grant_for(slab) if valid else b"\xc1" * 40)
        before = descriptors()
        with raw(house.address) as sock:
            sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            drain(sock)
        assert house.slabs == []
        rig.wait_until(lambda: descriptors() == before)

    def test_who_says_nothing_does_not_keep_it_for_ever(self, workshop, slab, visit):
        house = House(workshop, impatient=True)
        with raw(house.address):
            visit(house.address, 5.0).grant(grant_for(slab), slab.fd)

    def test_who_sends_a_byte_at_a_time(self, workshop, slab, visit):
        house = House(workshop)
        data = frame(grant_for(slab))
        fds = array.array("i", [slab.fd])
        with raw(house.address) as sock:
            sock.sendmsg([data[:4]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            for byte in data[4:]:
                sock.sendall(bytes([byte]))
            (length,) = struct.unpack("<I", sock.recv(4))
            while length:
                length -= len(sock.recv(length))
            assert sock.recv(1) == b"\1"
        assert len(house.slabs) == 1

    @pytest.mark.parametrize("error", [ValueError, MemoryError, KeyError, HandoverError])
    def test_a_mover_that_cannot_use_the_slab_says_so_and_lives(self, house, slab, visit, error):
        house.error = error
        one = visit(house.address)
        with pytest.raises(HandoverError, match="could not map the slab"):
            one.grant(grant_for(slab), slab.fd)
        house.error = None
        visit(house.address).grant(grant_for(slab), slab.fd)
        assert len(house.slabs) == 1

    def test_a_slab_of_another_size_than_granted(self, house, slab, visit):
        one = visit(house.address)
        with pytest.raises(HandoverError, match="could not map the slab"):
            one.grant(Grant(slab_bytes=slab.size * 2, **GRANT), slab.fd)
        visit(house.address).grant(grant_for(slab), slab.fd)


class FakeMover:
    """Listens where a mover would, and says what it is told."""

    def __init__(self, *answers):
        self.address = address_of(rig.engine_id(), 0)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(2)
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        sock, _ = self._listener.accept()
        sock.settimeout(5)
        with sock:
            for answer in self._answers:
                if callable(answer):
                    answer(sock)
                else:
                    with contextlib.suppress(BrokenPipeError):  # who has read enough hangs up
                        sock.sendall(answer)

    def close(self):
        self._thread.join()
        self._listener.close()


@pytest.fixture
def fake(workshop):
    def make(*answers):
        made = FakeMover(*answers)
        workshop.later(made.close)
        return made

    return make


class TestGarbageFromAMover:
    @pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
    def test_it_is_refused_by_name(self, fake, noise):
        if noise == NOISE["another message"]:
            noise = frame(Grant(slab_bytes=1, **GRANT))
        with pytest.raises(HandoverError, match="no valid Hello from the other process"):
            Visit(fake(noise).address, 1.0)

    def test_a_valid_message_may_be_too_long(self, fake):
        with pytest.raises(HandoverError, match=f"bytes is over {MAX_MESSAGE}"):
            Visit(fake(frame(rig.hello(summary="f" * MAX_MESSAGE))).address, 1.0)

    def test_another_protocol_is_refused_by_number(self, fake):
        with pytest.raises(HandoverError, match=f"protocol {PROTOCOL + 1}, we speak {PROTOCOL}"):
            Visit(fake(frame(rig.hello(protocol=PROTOCOL + 1))).address, 1.0)

    def test_a_later_protocol_may_say_more(self, fake):
        said = {**msgspec.to_builtins(rig.hello()), "protocol": PROTOCOL + 1, "news": [1]}
        with pytest.raises(HandoverError, match="we speak"):
            Visit(fake(frame(said)).address, 1.0)

    def test_silence(self, fake):
        with pytest.raises(HandoverError, match="no mover answers: timed out"):
            Visit(fake(lambda sock: time.sleep(0.3)).address, 0.1)

    def test_half_an_answer(self, fake):
        def dawdle(sock):
            sock.sendall(frame(rig.hello())[:10])
            time.sleep(0.3)

        with pytest.raises(HandoverError, match="no mover answers: timed out"):
            Visit(fake(dawdle).address, 0.1)

    def test_a_descriptor_with_the_hello_is_closed(self, fake, slab):
        fds = array.array("i", [slab.fd])
        before = descriptors()
        made = fake(
            lambda sock: sock.sendmsg(
                [frame(rig.hello())], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
            )
        )
        with pytest.raises(HandoverError, match="1 file descriptors instead of 0"):
            Visit(made.address, 1.0)
        made.close()
        assert descriptors() <= before

    @pytest.mark.parametrize("answer", [b"", b"\0"], ids=["gone", "wrong"])
    def test_a_grant_that_is_not_taken(self, fake, slab, visit, answer):
        def refuse(sock):
            sock.recv(4096)
            sock.sendall(answer)

        one = visit(fake(frame(rig.hello()), refuse).address)
        with pytest.raises(HandoverError, match="could not map the slab"):
            one.grant(grant_for(slab), slab.fd)

    def test_a_grant_that_is_never_answered(self, fake, slab, visit):
        one = visit(fake(frame(rig.hello()), lambda sock: time.sleep(0.4)).address, 0.1)
        with pytest.raises(HandoverError, match="did not take the slab: timed out"):
            one.grant(grant_for(slab), slab.fd)


def test_nobody_listens():
    began = time.monotonic()
    with pytest.raises(HandoverError, match="no mover answers"):
        Visit(address_of(rig.engine_id(), 0), 30.0)
    assert time.monotonic() - began < 5, "there is nothing to wait for"


def test_a_hello_and_a_grant_come_through_as_they_are():
    grant = Grant(slab_bytes=2**45, **GRANT)
    for message in (rig.hello(3, slice_index=1), grant):
        encoded = msgspec.msgpack.encode(message)
        assert msgspec.msgpack.decode(encoded, type=type(message)) == message
    assert isinstance(rig.hello(), Hello)
