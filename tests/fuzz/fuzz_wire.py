"""Fuzz the protocol with libFuzzer: `python tests/fuzz/fuzz_wire.py -atheris_runs=20000`.

An input is a conversation: frames, each behind two bytes with its length. Whatever it says, frames
are read or refused, nothing is raised, and in the end nobody holds anything. Small numbers in a
frame stand for those that the server gave out, which no input could know. Needs `atheris`; an input
that fails is written to a file, and given as an argument it is tried again.
"""

from __future__ import annotations

import logging
import random
import struct
import sys
from array import array

import atheris


class Loud(logging.Handler):
    """The service goes on after an error of ours; a fuzzer must not."""

    def emit(self, record):
        if record.levelno >= logging.ERROR:
            raise record.exc_info[1]


logging.getLogger("lmcache").addHandler(Loud())

with atheris.instrument_imports(include=["lmcache.core"]):
    import msgspec

    from lmcache.core.attachment import Attachment
    from lmcache.core.decider import Decider
    from lmcache.core.errors import ServiceError
    from lmcache.core.eviction.lru import LRUPolicy
    from lmcache.core.flights import Flights
    from lmcache.core.geometry import Geometry
    from lmcache.core.service import wire
    from lmcache.core.service.service import Service, Terms, Visited
    from lmcache.core.slab import CONTROL_BYTES, MAX_MOVERS, MOVER_BYTES, Slab
    from lmcache.core.tiers import Tiers

GEOMETRY = Geometry(page_tokens=2, pages_per_chunk=2, slices=(64, 64), layout=bytes(32))
CHUNK = GEOMETRY.chunk_tokens
SLOT_BYTES = 4096
SLOTS = 6
SESSIONS = (1, 2)
LENGTH = struct.Struct(">H")


class Scene:
    """A service without a socket, and two engines whose movers are we."""

    def __init__(self):
        self.decider = Decider(Slab.create(CONTROL_BYTES + SLOTS * SLOT_BYTES), LRUPolicy())
        # no mode is served, so that no engine is visited
        terms = Terms(chunk_size=CHUNK, modes=(), fetch_timeout_s=1.0, lease_s=60.0)
        self.service = Service(self.decider, Tiers(self.decider, []), terms, lambda: None)
        for number in SESSIONS:
            self._admit(number)

    def _admit(self, number):
        about = wire.Attach(release="fuzz", engine=f"e{number}", name=f"e{number}", movers=1)
        words = [self.service._words.pop()]
        self.decider.slab.write_word(words[0] * MOVER_BYTES, 0)
        flights = Flights(self.decider, GEOMETRY, words)
        tiers = self.service.tiers
        joined = Attachment(self.decider, tiers, GEOMETRY, flights, [], [], number, owned=False)
        visited = Visited(b"peer", wire.Call(1, 0, about), about, words, joined)
        assert isinstance(self.service._admit(visited), wire.Attached)

    def handle(self, frame):
        """Have a frame handled; what comes of it can be read."""
        answer = self.service.handle(b"peer", self._translated(frame))
        for data in [answer] if answer else []:
            assert wire.decode_answer(data).number
        assert not list(self.service.due())

    def _translated(self, frame):
        try:
            call = wire.decode_call(frame)
        except ServiceError:
            return frame
        session = self.service.sessions.get(call.session)
        if session is None:
            return frame
        body = call.body
        if isinstance(body, wire.Ping):
            self._move(session)
        elif isinstance(body, (wire.Depart, wire.Cancel)):
            said = {
                "stores": _picked(list(session.reserved), body.stores),
                "loads": _picked(list(session.hits), body.loads),
            }
            body = msgspec.structs.replace(body, **said)
        elif isinstance(body, (wire.Promise, wire.Release)) and body.lease is not None:
            [lease] = _picked(list(session.hits), [body.lease])
            body = msgspec.structs.replace(body, lease=lease)
        return wire.encode(wire.Call(call.number, call.session, body))

    def _move(self, session):
        """Do what movers do with all that has departed."""
        slab = self.decider.slab
        for flight in session.attachment.flights._air:
            for slot in flight.stores:
                for i in range(len(GEOMETRY.slices)):
                    slab.write_word(slot.offset + GEOMETRY.tag_offset(i), slot.generation)
            slab.write_word(session.words[0] * MOVER_BYTES, flight.number)

    def end(self):
        """Every engine leaves: then nothing is held, and the next input finds an empty house."""
        service, decider = self.service, self.decider
        for number in list(service.sessions):
            service.handle(b"peer", wire.encode(wire.Call(0, number, wire.Detach())))
        service.sweep()
        assert not service.leaving
        assert len(service._words) == MAX_MOVERS
        assert not decider._reserved
        assert len(decider.leases) == 0
        decider.clear()
        assert decider.free_bytes == decider.capacity_bytes
        decider._shelf.evicted.clear()
        service._memo.__init__(service._memo._most_tokens)
        for number in SESSIONS:
            self._admit(number)


def _picked(given, chosen):
    return [given[n] if n < len(given) else n for n in chosen]


def split(data):
    """The frames of a conversation."""
    at, frames = 0, []
    while at + LENGTH.size <= len(data):
        (length,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        frames.append(data[at : at + length])
        at += length
    return frames


def join(frames):
    """The conversation of some frames."""
    return b"".join(LENGTH.pack(len(frame)) + frame for frame in frames if len(frame) < 1 << 16)


def more(seed, start, stop, like=None):
    """Tokens of one of a few prompts."""
    tokens = array("I", range(1000 * seed + start, 1000 * seed + stop)).tobytes()
    return wire.More(root=bytes(32), at=0 if like else start, like=like, tokens=tokens)


def one_of_each(rng):
    """Some frame that makes sense."""
    stop = rng.choice([CHUNK, 2 * CHUNK, 2 * CHUNK + 2, 3 * CHUNK])
    like = rng.choice([None, None, wire.Like(rng.randrange(3), CHUNK)])
    said = more(rng.randrange(3), like.tokens if like else 0, stop, like)
    about = {"sequence": rng.randrange(3), "more": said, "stop": stop}
    body = rng.choice(
        [
            wire.Attach(release="x", engine="e1", name="e1", movers=1),
            wire.Lookup(owner=rng.choice("ab"), **about),
            wire.Reserve(start=0, tail=True, **about),
            wire.Depart(number=rng.randrange(1, 4), stores=[0, 1], loads=[]),
            wire.Depart(number=rng.randrange(1, 4), stores=[], loads=[0]),
            wire.Cancel(stores=[0], loads=[0]),
            wire.Promise(0),
            wire.Release("a", rng.choice([None, 0])),
            wire.Forget([0, 1]),
            wire.Ping(),
            wire.Detach(),
        ]
    )
    return wire.encode(wire.Call(rng.choice([0, 1, 1]), rng.choice(SESSIONS), body))


def conversation(rng):
    """What two engines might say: one stores, and both look it up."""
    whole = {"sequence": 1, "more": more(1, 0, 2 * CHUNK), "stop": 2 * CHUNK}
    bodies = [
        (1, wire.Reserve(start=0, tail=True, **whole)),
        (1, wire.Depart(number=1, stores=[0, 1], loads=[])),
        (1, wire.Ping()),
        (2, wire.Lookup(owner="a", **whole)),
        (2, wire.Promise(0)),
        (2, wire.Depart(number=1, stores=[], loads=[0])),
        (2, wire.Ping()),
    ]
    frames = [wire.encode(wire.Call(1, session, body)) for session, body in bodies]
    for _ in range(rng.randrange(8)):
        frames.insert(rng.randrange(len(frames) + 1), one_of_each(rng))
    return frames


def mutate(data, max_size, seed):
    """A conversation a little different: in its frames' order, or in their bytes."""
    rng = random.Random(seed)
    frames = split(data) if rng.random() < 0.9 else conversation(rng)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(frames) + 1)
        match rng.randrange(6):
            case 0:
                frames.insert(at, one_of_each(rng))
            case 1:
                frames.insert(at, rng.choice(frames or [b""]))
            case 2:
                del frames[at : at + 1]
            case 3:
                rng.shuffle(frames)
            case _ if at < len(frames):
                frames[at] = bytes(atheris.Mutate(frames[at], len(frames[at]) + 64))
    return join(frames)[:max_size]


SCENE = Scene()


def try_one(data):
    """What libFuzzer calls."""
    for frame in split(data):
        for read in (wire.decode_call, wire.decode_answer):
            try:
                found = read(frame)
            except ServiceError:
                continue
            again = wire.encode(found)
            assert wire.encode(read(again)) == again
        SCENE.handle(frame)
    SCENE.end()


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_one, custom_mutator=mutate)
    atheris.Fuzz()
