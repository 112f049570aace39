"""The protocol between engines and the server: what is well-formed, and what nothing can break."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
import threading
from array import array
from itertools import pairwise
from pathlib import Path

import msgspec
import msgspec.inspect as shapes
import pytest
import rig
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmcache.backends.memory import MemoryBackend
from lmcache.core.chain import KeyChain
from lmcache.core.engine import moves_for
from lmcache.core.errors import ServiceError
from lmcache.core.index import Slot
from lmcache.core.receipts import Reason
from lmcache.core.service import peers, sequences, stream, wire
from lmcache.core.service import session as sessions
from lmcache.core.service.service import Service, Terms
from lmcache.core.slab import MAX_MOVERS

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = wire.Request.__args__
REPLIES = wire.Reply.__args__
PARTS = (wire.More, wire.Like, wire.Shown, wire.Deployment)
UNBOUNDED = {("Attach", "protocol")}
"""Whatever an engine speaks, it must be able to say so."""

CHUNK = rig.CHUNK_TOKENS
SLOTS = 8
RANKS = (1, 2, 1)
"""Of each engine."""
BYTES = (shapes.BytesType, shapes.MemoryViewType)
BOGUS = 1 << 40
"""A number that nobody was ever given."""


def fields_of(kind):
    return {field.name: field for field in shapes.type_info(kind).fields}


def values(of):
    """Valid values of a type, as a strategy."""
    if isinstance(of, shapes.IntType):
        return st.integers(
            -(1 << 63) if of.ge is None else of.ge, (1 << 64) - 1 if of.le is None else of.le
        )
    if isinstance(of, shapes.StrType):
        return st.text(max_size=min(of.max_length, 20))
    if isinstance(of, BYTES):
        most = 40 if of.max_length is None else min(of.max_length, 40)
        return st.binary(min_size=of.min_length or 0, max_size=most)
    if isinstance(of, shapes.FloatType):
        return st.floats(0 if of.ge is None else of.ge, allow_nan=False)
    if isinstance(of, shapes.BoolType):
        return st.booleans()
    if isinstance(of, shapes.NoneType):
        return st.none()
    if isinstance(of, shapes.UnionType):
        return st.one_of(map(values, of.types))
    if isinstance(of, shapes.ListType):
        return st.lists(values(of.item_type), min_size=of.min_length or 0, max_size=4)
    if isinstance(of, shapes.DictType):
        return st.dictionaries(values(of.key_type), values(of.value_type), max_size=4)
    parts = {field.name: values(field.type) for field in of.fields}
    return st.fixed_dictionaries(parts).map(lambda said: of.cls(**said))


def bodies(kinds):
    return st.one_of([values(shapes.type_info(kind)) for kind in kinds])


WORDS = values(fields_of(wire.Call)["session"].type)
CALLS = st.builds(wire.Call, WORDS, WORDS, bodies(REQUESTS))
ANSWERS = st.builds(wire.Answer, WORDS, st.binary(min_size=32, max_size=32), bodies(REPLIES))

PACKED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=40)
    | st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=9)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
"""Whatever MessagePack can say."""


@st.composite
def nearly(draw, kinds):
    """A message of the right shape, with anything at all in its fields."""
    kind = draw(st.sampled_from(kinds))
    said = {"type": draw(st.sampled_from([kind.__name__, "Attach", "Nothing"]))}
    for name in draw(st.lists(st.sampled_from([*fields_of(kind), "other"]), unique=True)):
        said[name] = draw(PACKED)
    head = st.integers(0, 9) | PACKED
    return msgspec.msgpack.encode([draw(head), draw(head), said])


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "splice", "insert"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=3,
)


def damage(frame, edits, other=b""):
    """A frame after a bad journey: bits flipped, cut off, or run into another."""
    data = bytearray(frame)
    for how, where, extra in edits:
        at = int(where * max(0, len(data) - 1))
        if how == "flip" and data:
            data[at] ^= 1 << extra[0] % 8
        elif how == "insert":
            data[at:at] = extra
        else:
            data[at:] = other[at + extra[0] % 5 :] if how == "splice" else b""
    return bytes(data)


def damaged(frames):
    return st.builds(damage, frames, EDITS, frames)


def examples_of(kind):
    """Any value of a type, the same each time."""
    said = {}
    for name, field in fields_of(kind).items():
        if field.required:
            said[name] = plain(field.type)
    return said


def plain(of):
    if isinstance(of, shapes.IntType):
        return of.ge or 0
    if isinstance(of, BYTES):
        return bytes(of.min_length or 0)
    if isinstance(of, shapes.ListType):
        return [plain(of.item_type)] * (of.min_length or 0)
    if isinstance(of, shapes.StructType):
        return examples_of(of.cls)
    if isinstance(of, shapes.NamedTupleType):
        return [plain(field.type) for field in of.fields]
    if isinstance(of, shapes.UnionType):
        return None
    return {shapes.BoolType: False, shapes.StrType: "", shapes.FloatType: 0.0, shapes.DictType: {}}[
        type(of)
    ]


def limits(of):
    """Pairs of a value at a bound and one just over it, for every bound of a type."""
    if isinstance(of, shapes.UnionType):
        return [pair for option in of.types for pair in limits(option)]
    if isinstance(of, shapes.StructType):
        return [pair for field in of.fields for pair in limits_inside(of, field)]
    if isinstance(of, shapes.DictType):
        return [*length_limits(of, names), *limits_of_parts(of)]
    if isinstance(of, shapes.ListType):
        items = [([inside], [outside]) for inside, outside in limits(of.item_type)]
        return [*length_limits(of, lambda length: [plain(of.item_type)] * length), *items]
    if isinstance(of, (shapes.IntType, shapes.FloatType)):
        ends = ((of.ge, -1), (of.le, 1))
        return [(end, end + over) for end, over in ends if end is not None]
    if isinstance(of, (*BYTES, shapes.StrType)):
        return length_limits(of, (lambda n: "x" * n) if isinstance(of, shapes.StrType) else bytes)
    return []


def length_limits(of, made):
    """`made` makes a value of some length."""
    lengths = ((of.min_length or None, -1), (of.max_length, 1))
    return [(made(end), made(end + over)) for end, over in lengths if end is not None]


def limits_inside(of, field):
    about = examples_of(of.cls)
    return [({**about, field.name: i}, {**about, field.name: o}) for i, o in limits(field.type)]


def limits_of_parts(of):
    keys = [({inside: 0}, {outside: 0}) for inside, outside in limits(of.key_type)]
    return keys + [({"l1": inside}, {"l1": outside}) for inside, outside in limits(of.value_type)]


def names(length):
    return {f"tier {i}": 0 for i in range(length)}


def sent(kind, **said):
    """A frame that says this, whether or not it may."""
    head = [1, 1] if kind in REQUESTS else [1, bytes(32)]
    return msgspec.msgpack.encode([*head, {"type": kind.__name__, **examples_of(kind), **said}])


def decode(kind, data):
    return (wire.decode_call if kind in REQUESTS else wire.decode_answer)(data).body


BOUNDED = [(kind, name) for kind in (*REQUESTS, *REPLIES) for name in fields_of(kind)]


class TestMessages:
    @given(CALLS)
    def test_a_call_arrives_as_it_was_sent(self, call):
        data = wire.encode(call)
        assert wire.decode_call(data) == call
        assert wire.decode_call(memoryview(data)) == call

    @given(ANSWERS)
    def test_an_answer_arrives_as_it_was_sent(self, answer):
        assert wire.decode_answer(wire.encode(answer)) == answer

    @pytest.mark.parametrize("kind", [*REQUESTS, *REPLIES])
    def test_every_message_can_be_sent_and_no_other_side_takes_it(self, kind):
        body = decode(kind, sent(kind))
        assert type(body) is kind
        other = wire.decode_answer if kind in REQUESTS else wire.decode_call
        with pytest.raises(ServiceError, match=f"not a message of protocol {wire.PROTOCOL}"):
            other(sent(kind))

    @pytest.mark.parametrize("kind", [*REQUESTS, *REPLIES])
    def test_a_field_nobody_knows_is_passed_over(self, kind):
        assert decode(kind, sent(kind, new=[1, {"a": 2}])) == decode(kind, sent(kind))

    @given(
        st.binary(max_size=200)
        | PACKED.map(msgspec.msgpack.encode)
        | nearly(REQUESTS)
        | nearly(REPLIES)
        | damaged(CALLS.map(wire.encode))
        | damaged(ANSWERS.map(wire.encode))
    )
    @example(b"\x93\x01\x01\x82\xa4type\xa6Forget\xa9sequences\xdd\xff\xff\xff\xff")
    @example(b"\x94\x01\x01\x81\xa4type\xa4Ping" + b"\x91" * 100_000)
    @example(b"\x93\x01\x01\x83\xa4type\xa7Release\xa5owner\xa3\xed\xa0\x80\xa5lease\xc0")
    @settings(max_examples=600)
    def test_whatever_arrives_is_a_message_or_refused(self, data):
        for read in (wire.decode_call, wire.decode_answer):
            try:
                frame = read(data)
            except ServiceError:
                continue
            assert wire.encode(read(wire.encode(frame))) == wire.encode(frame)
        found = wire.foreign_protocol(data)
        assert found is None or found[1] != wire.PROTOCOL

    @given(st.integers(0, (1 << 63) - 1), st.integers(-(1 << 63), (1 << 64) - 1))
    def test_whoever_speaks_another_protocol_can_say_so(self, number, protocol):
        data = msgspec.msgpack.encode([number, 0, {"type": "Attach", "protocol": protocol, "x": 1}])
        ours = protocol == wire.PROTOCOL
        assert wire.foreign_protocol(data) == (None if ours else (number, protocol))


class TestBounds:
    @pytest.mark.parametrize(("kind", "name"), BOUNDED)
    def test_one_over_a_bound_is_refused(self, kind, name):
        for inside, outside in limits(fields_of(kind)[name].type):
            decode(kind, sent(kind, **{name: inside}))
            with pytest.raises(ServiceError, match=f"not a message of .*{name}"):
                decode(kind, sent(kind, **{name: outside}))

    @pytest.mark.parametrize("kind", [*REQUESTS, *REPLIES, *PARTS])
    def test_every_field_has_a_bound(self, kind):
        for name, field in fields_of(kind).items():
            free = isinstance(field.type, (shapes.BoolType, shapes.StructType))
            if (kind.__name__, name) not in UNBOUNDED and not free:
                assert list(limits(field.type)), f"{kind.__name__}.{name}"

    def test_a_message_that_is_too_long(self):
        with pytest.raises(ServiceError, match="over 33554432"):
            wire.encode(wire.Call(1, 1, wire.Forget([(1 << 63) - 1] * (1 << 22))))
        for read in (wire.decode_call, wire.decode_answer):
            with pytest.raises(ServiceError, match="over 33554432"):
                read(bytes(wire.MAX_MESSAGE + 1))

    def test_the_longest_list_of_slots_fits_into_a_message(self):
        slot = Slot(bytes(32), *[(1 << 63) - 1] * 4)
        for body in (
            wire.Reserved([slot] * wire.MAX_SLOTS, Reason.NONE.name),
            wire.Found(
                slots=[slot] * wire.MAX_SLOTS,
                lease=1,
                tokens=1,
                asked=1,
                reason=Reason.NONE.name,
                by_tier={},
                size=1,
                milliseconds=1.0,
            ),
        ):
            assert len(wire.encode(wire.Answer(1, bytes(32), body))) <= wire.MAX_MESSAGE

    def test_the_longest_prompt_fits_into_a_message(self):
        more = wire.More(root=bytes(32), tokens=bytes(4 * wire.MAX_TOKENS))
        call = wire.Call(1, 1, wire.Lookup(owner="o" * 512, sequence=1, more=more, stop=0))
        assert wire.decode_call(wire.encode(call)) == call


PAGE = (ROOT / "docs" / "protocol.md").read_text("utf-8")


def documented():
    """Message, field and type of each row of the tables of messages."""
    rows, message = [], ""
    section = PAGE[PAGE.index("### 2.1") : PAGE.index("### 2.3")]
    for line in section.splitlines():
        if line.startswith(("| `", "| |")):
            _, first, field, of, *_ = (cell.strip() for cell in line.split("|"))
            message = first.removesuffix(" *").strip("`") or message
            rows.append((message, field.strip("`"), of))
    return rows


def called(of):
    """What the tables call a type."""
    if isinstance(of, shapes.UnionType):
        return " or ".join(called(option) for option in of.types)
    if isinstance(of, shapes.ListType) and isinstance(of.item_type, shapes.NamedTupleType):
        return "`slots`" if of.max_length == wire.MAX_SLOTS else "a list"
    if isinstance(of, shapes.ListType):
        items, ends = called(of.item_type), f"{of.min_length}..{of.max_length}"
        if (items, of.max_length) == ("`word`", 1 << 20):
            return "`words`"
        return f"{ends} {items}" if of.min_length else f"at most {of.max_length} {items}"
    if isinstance(of, shapes.DictType):
        return f"at most {of.max_length} {called(of.key_type)}: {called(of.value_type)}"
    if isinstance(of, shapes.IntType):
        words = {
            (0, (1 << 63) - 1): "`word`",
            (1, (1 << 63) - 1): "`count`",
            (0, wire.MAX_TOKENS): "`position`",
            (None, None): "integer",
        }
        return words.get((of.ge, of.le), f"{of.ge}..{of.le}")
    if isinstance(of, BYTES):
        return "`key`" if of.min_length == of.max_length == 32 else f"at most {of.max_length} bytes"
    if isinstance(of, shapes.StrType):
        return {512: "`name`", wire.MAX_TEXT: "`text`"}[of.max_length]
    if isinstance(of, shapes.StructType):
        return f"`{of.cls.__name__}`"
    kinds = {shapes.NoneType: "nil", shapes.BoolType: "boolean", shapes.FloatType: "`number`"}
    return kinds[type(of)]


class TestDocument:
    """docs/protocol.md says what the code does."""

    def test_every_message_and_field_is_in_its_tables(self):
        expected = [
            (kind.__name__, field, called(about.type))
            for kind in (*REQUESTS, *PARTS, *REPLIES)
            for field, about in fields_of(kind).items()
        ]
        rows = [row for row in documented() if row[1]]
        assert sorted(rows) == sorted(expected)

    def test_messages_without_fields_are_there_too(self):
        empty = {kind.__name__ for kind in (*REQUESTS, *REPLIES) if not fields_of(kind)}
        assert {message for message, field, _ in documented() if not field} == empty

    def test_its_example(self):
        [(said, data)] = re.findall(r"^    (\[.*\]) +((?:[0-9a-f]{2} ?)+)$", PAGE, re.MULTILINE)
        length, frame = bytes.fromhex(data)[:4], bytes.fromhex(data)[4:]
        assert int.from_bytes(length, "little") == len(frame)
        assert msgspec.msgpack.decode(frame) == json.loads(said)
        assert wire.decode_call(frame) == wire.Call(1, 0, wire.Ping())

    def test_its_limits(self):
        for limit in (
            wire.MAX_SLOTS,
            sequences.MAX_SEQUENCES,
            sessions.MAX_LOOKUPS,
            MAX_MOVERS,
            peers.MAX_PEERS,
            peers.TURN,
        ):
            assert f"| {limit:,}" in PAGE
        assert f"for {stream.FAITH} times" in PAGE
        assert f"| {stream.MAX_BEHIND >> 20} MiB |" in PAGE
        assert f"| {wire.MAX_MESSAGE >> 20} MiB |" in PAGE
        assert f"| {sequences.MAX_KNOWN_TOKENS >> 20} Mi |" in PAGE
        assert f"0 to {wire.MAX_TOKENS} |" in PAGE


class Engine:
    """Ranks that do what their engine's scheduler tells them, whatever that is."""

    def __init__(self, workshop, ranks):
        self.id = rig.engine_id()
        self.ranks = [rig.Rank(workshop, self.id, number) for number in range(ranks)]

    def run(self, number, slots, geometry):
        """Make a step's copies, as far as the ranks are attached."""
        moves = moves_for(slots, geometry, range(32), 0, 32)
        for rank in [rank for rank in self.ranks if rank.mover]:
            rank.mover.store(moves)
            rank.mover.publish(moves)
            rank.mover.finish(number)


class Loud(logging.Handler):
    """The service goes on after an error of ours; a test must not."""

    def emit(self, record):
        if record.levelno >= logging.ERROR:
            raise record.exc_info[1]


class Crowd:
    """A service without a socket, and some engines that may attach to it."""

    def __init__(self, *, slower=False):
        self._workshop = rig.Workshop()
        self._woken = threading.Event()
        self.decider = self._workshop.decider(SLOTS)
        backends = [MemoryBackend()] if slower else []
        self.tiers = self._workshop.tiers(self.decider, *backends)
        terms = Terms(CHUNK, ("engine_driven",), 2.0, 60.0, release="crowd")
        self.service = Service(self.decider, self.tiers, terms, self._woken.set)
        self._workshop.later(self.service.close)
        self.engines = [Engine(self._workshop, ranks) for ranks in RANKS]
        self.known = [0, 0, 0]
        """The sessions, by engine."""
        self.given = [[], [], []]
        """Slots and leases each was ever given, by what a message calls them."""
        self.leased = [[], [], []]
        self.answered = []

    def __enter__(self):
        self._loud = Loud()
        logging.getLogger("lmcache").addHandler(self._loud)
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.end()
        finally:
            logging.getLogger("lmcache").removeHandler(self._loud)
            self._workshop.close()

    def handle(self, peer, frame):
        """Have it handled, and take the answers that come of it."""
        data = frame if isinstance(frame, bytes) else wire.encode(frame)
        answer = self.service.handle(b"peer %d" % peer, data)
        if answer is not None:
            self._take(answer)
        self.settle()

    def settle(self):
        """Wait for the visits under way; take what has become due."""
        while True:
            self._woken.clear()
            for _, answer in self.service.due():
                self._take(answer)
            self.service.sweep()
            held = [*self.service.sessions.values(), *self.service.leaving]
            taken = sum(len(session.words) for session in held)
            if taken + len(self.service._words) == MAX_MOVERS:
                return
            assert self._woken.wait(10), "a visit that never ends"

    def _take(self, data):
        answer = wire.decode_answer(data)
        assert answer.boot == self.service.boot
        assert answer.number
        self.answered.append(answer)
        for i, engine in enumerate(self.engines):
            session = self._session_of(engine)
            if isinstance(answer.body, wire.Attached) and session:
                self.known[i] = session.number
            if session and isinstance(answer.body, (wire.Found, wire.Reserved)):
                self.given[i] = list(session.reserved)
                self.leased[i] += [n for n in session.hits if n not in self.leased[i]]

    def _session_of(self, engine):
        found = [s for s in self.service.sessions.values() if s.about.engine == engine.id]
        assert len(found) <= 1
        return found[0] if found else None

    def attach(self, i, **said):
        engine = self.engines[i]
        about = {"release": "test", "engine": engine.id, "name": f"engine {i}"}
        body = wire.Attach(**{**about, "movers": len(engine.ranks), **said})
        return wire.Call(7, 0, body)

    def run(self, i):
        """The ranks of an engine make the copies of every step that departed."""
        session = self._session_of(self.engines[i])
        for flight in list(session.attachment.flights._air) if session else ():
            self.engines[i].run(flight.number, flight.stores, session.attachment.geometry)

    def check(self):
        """Nobody has a place in the slab that is somebody else's, or a key."""
        held = {}
        for session in [*self.service.sessions.values(), *self.service.leaving]:
            air = [slot for flight in session.attachment.flights._air for slot in flight.stores]
            for slot in [*session.reserved.values(), *air]:
                held[slot.generation] = (slot.offset, slot.offset + slot.size)
            told = [len(chain.tokens) for chain in session.sequences.values()]
            assert session.sequences.tokens == sum(told)
            for chain in session.sequences.values():
                last = len(chain.tokens) // chain.chunk_tokens - 1
                assert chain.key(last) == fresh(chain).key(last)
        for lease in self.decider.leases:
            for entry in lease.entries:
                slot = self.decider._index.slot(entry, 0)
                held[slot.generation] = (slot.offset, slot.offset + slot.size)
        ordered = sorted(held.values())
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))

    def end(self):
        """Every engine leaves: then nothing is held."""
        for number in list(self.service.sessions):
            self.service.handle(b"", wire.encode(wire.Call(0, number, wire.Detach())))
        rig.wait_until(lambda: self.service.sweep() or not self.service.leaving)
        assert len(self.service._words) == MAX_MOVERS
        assert not self.tiers._fetches
        assert self.tiers._reads.pool.wait(10.0)
        self.tiers.flush()
        assert not self.decider._reserved
        rig.assert_idle(self.decider)


SMALL = st.integers(0, 3)
LENGTHS = st.sampled_from([1, 2, 3]).map(lambda chunks: chunks * CHUNK) | st.integers(0, 50)
OWNERS = st.sampled_from(["a", "b", "c"])
CHOSEN = st.sampled_from([[]] * 8 + [[0, 1, 2, 3]] * 16 + [[0], [2, 1], [0, 0], [0, 9]])
"""Which of the numbers that the server gave out, as far as it gave so many; 9 it never gave."""


NOTHING, SHOWN = st.just([]), st.lists(values(shapes.type_info(wire.Shown)), max_size=2)


@st.composite
def about_tokens(draw):
    """A sequence that is begun, mostly, or goes on, and how much of it is meant."""
    length = draw(LENGTHS)
    at = draw(st.sampled_from([0] * 30 + [CHUNK, 2 * CHUNK]))
    like = draw(st.sampled_from([None] * 6 + [wire.Like(n, CHUNK) for n in range(4)]))
    known = max(at, like.tokens if like else 0)
    told = tokens_of(draw(st.integers(0, 2)), known, max(known, length))
    shown = draw(st.sampled_from([NOTHING] * 6 + [SHOWN]).flatmap(lambda shown: shown))
    root = draw(st.sampled_from([bytes(32)] * 6 + [b"r" * 32]))
    more = wire.More(root=root, at=at, like=like, tokens=told, shown=shown)
    return {
        "sequence": draw(SMALL),
        "more": draw(st.sampled_from([more] * 30 + [None])),
        "stop": draw(st.sampled_from([length] * 20 + [0, 7, 3 * CHUNK])),
    }


SAYINGS = "lookup lookup lookup reserve reserve depart depart keep end other".split()


@st.composite
def sayings(draw):
    """What an engine may say, its small numbers standing for those that the server gave it."""
    match draw(st.sampled_from(SAYINGS)):
        case "lookup":
            return wire.Lookup(owner=draw(OWNERS), **draw(about_tokens()))
        case "reserve":
            start, tail = draw(st.sampled_from([0, 0, CHUNK, 99])), draw(st.booleans())
            return wire.Reserve(start=start, tail=tail, **draw(about_tokens()))
        case "depart":
            return wire.Depart(
                number=draw(st.sampled_from([1] * 30 + [0])),
                stores=draw(CHOSEN),
                loads=draw(CHOSEN),
            )
        case "keep":
            return wire.Promise(draw(SMALL))
        case "end":
            return wire.Release(draw(OWNERS), draw(st.none() | SMALL))
    return draw(
        st.builds(wire.Cancel, stores=CHOSEN, loads=CHOSEN)
        | st.builds(wire.Forget, st.lists(SMALL, max_size=3))
        | st.just(wire.Ping())
        | st.just(wire.Detach())
        | bodies(REQUESTS)
    )


def fresh(chain):
    """The same sequence, of which nothing is known yet."""
    return KeyChain(
        chain.root,
        chain.tokens[:],
        page_tokens=chain.page_tokens,
        pages_per_chunk=chain.pages_per_chunk,
        inserts=chain.inserts,
    )


def tokens_of(seed, start, stop):
    return array("I", rig.tokens(stop, seed)[start:]).tobytes()


def resolve(crowd, i, body):
    """The message with the server's numbers in it."""

    def pick(given, chosen):
        return [given[n] if n < 9 else BOGUS for n in chosen if n == 9 or n < len(given)]

    given, leased = crowd.given[i], crowd.leased[i]
    session = crowd._session_of(crowd.engines[i])
    match body:
        case wire.Depart() | wire.Cancel() if max([0, *body.stores, *body.loads]) <= 9:
            stores, loads = pick(given, body.stores), pick(leased, body.loads)
            body = msgspec.structs.replace(body, stores=stores, loads=loads)
            if isinstance(body, wire.Depart) and body.number == 1 and session:
                number = session.attachment.flights._sent + 1
                body = msgspec.structs.replace(body, number=number)
        case wire.Promise(lease) | wire.Release(_, lease) if lease is not None:
            body = msgspec.structs.replace(body, lease=[*pick(leased, [lease]), BOGUS][0])
    return body


TERMS = st.sampled_from(
    [{}, {}, {"protocol": 2}, {"token": "guess"}, {"chunk_size": 99}, {"mode": "x"}, {"movers": 3}]
)
WHO = st.integers(0, 2)


@st.composite
def deeds(draw):
    """What happens next: mostly an engine says something that might make sense."""
    who = draw(WHO)
    match draw(st.sampled_from(["say"] * 18 + ["store"] * 3 + ["run"] * 3 + ["confuse", "attach"])):
        case "say":
            return ("say", who, draw(st.sampled_from([1, 1, 1, 0, 9])), draw(sayings()))
        case "store":
            return ("store", who, wire.Reserve(start=0, tail=True, **draw(about_tokens())))
        case "confuse":
            return ("confuse", who, draw(WHO), draw(WORDS), draw(sayings()))
        case "attach":
            return ("attach", who, draw(WHO), draw(TERMS))
    return ("run", who)


@st.composite
def worse_deeds(draw):
    """Likewise, but what is said may be garbled on its way."""
    deed = draw(deeds())
    if deed[0] == "say" and draw(st.sampled_from([True, False, False])):
        return (*deed, draw(EDITS))
    if deed[0] == "attach":
        return ("attach badly", deed[1], draw(EDITS))
    return deed


LIVES = st.lists(deeds(), min_size=20, max_size=60)
WORSE_LIVES = st.lists(worse_deeds(), min_size=20, max_size=60)
MANY = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def say(crowd, i, number, body, edits=()):
    if crowd._session_of(crowd.engines[i]) is None:
        crowd.handle(i, crowd.attach(i))
    frame = wire.encode(wire.Call(number, crowd.known[i], resolve(crowd, i, body)))
    crowd.handle(i, damage(frame, edits, wire.encode(crowd.attach(i))))


def do(crowd, deed):
    match deed:
        case ["say", i, number, body, *edits]:
            say(crowd, i, number, body, *edits)
        case ["store", i, body]:
            say(crowd, i, 1, body)
            say(crowd, i, 0, wire.Depart(number=1, stores=[0, 1, 2, 3], loads=[]))
            crowd.run(i)
            crowd.settle()
        case ["confuse", i, peer, session, body]:
            sessions = [*crowd.known, session]
            crowd.handle(peer, wire.Call(1, sessions[session % 4], resolve(crowd, i, body)))
        case ["attach", i, peer, said]:
            crowd.handle(peer, crowd.attach(i, **said))
        case ["attach badly", i, edits]:
            crowd.handle(i, damage(wire.encode(crowd.attach(i)), edits))
        case ["run", i]:
            crowd.run(i)
            crowd.settle()
    crowd.check()


class TestService:
    @settings(max_examples=60, **MANY)
    @given(st.booleans(), LIVES)
    def test_any_calls_in_any_order(self, slower, lives):
        with Crowd(slower=slower) as crowd:
            for deed in lives:
                do(crowd, deed)

    @settings(max_examples=40, **MANY)
    @given(st.booleans(), WORSE_LIVES)
    def test_any_garbled_calls(self, slower, lives):
        with Crowd(slower=slower) as crowd:
            for deed in lives:
                do(crowd, deed)

    @given(st.lists(st.binary(max_size=60) | nearly(REQUESTS) | damaged(CALLS.map(wire.encode))))
    @settings(max_examples=60, **MANY)
    def test_frames_of_anybody(self, frames):
        with Crowd() as crowd:
            for frame in frames:
                crowd.handle(0, frame)
            assert not crowd.service.sessions

    @pytest.mark.parametrize("kind", [wire.Depart, wire.Cancel])
    @pytest.mark.parametrize("wrong", [[0, 9], [0, 0]])
    def test_a_call_that_names_a_wrong_slot_takes_none(self, kind, wrong):
        with Crowd() as crowd:
            lookups = {"sequence": 1, "stop": CHUNK, "more": begun(CHUNK)}
            say(crowd, 0, 1, wire.Reserve(start=0, tail=False, **lookups))
            assert len(crowd.given[0]) == 1
            number = {"number": 1} if kind is wire.Depart else {}
            say(crowd, 0, 0, kind(stores=wrong, loads=[], **number))
            assert not crowd.service.sessions

    def test_what_slower_tiers_were_asked_for_a_dead_engine_is_forgotten(self):
        with Crowd(slower=True) as crowd:
            say(crowd, 0, 1, wire.Lookup(owner="a", sequence=1, stop=CHUNK, more=begun(CHUNK)))
            rig.wait_until(lambda: crowd.settle() or len(crowd.answered) == 3)
            assert [type(a.body) for a in crowd.answered[1:]] == [wire.Fetching, wire.Found]
            assert crowd.tiers._fetches

    def test_a_late_answer_to_nobody_is_not_sent(self):
        with Crowd(slower=True) as crowd:
            say(crowd, 0, 0, wire.Lookup(owner="a", sequence=1, stop=CHUNK, more=begun(CHUNK)))
            rig.wait_until(lambda: crowd.settle() or not crowd.service.is_fetching())
            assert [type(a.body) for a in crowd.answered] == [wire.Attached]

    def test_no_more_slots_than_one_answer_can_hold(self, monkeypatch):
        monkeypatch.setattr(wire, "MAX_SLOTS", 2)
        with Crowd() as crowd:
            lookups = {"sequence": 1, "stop": 4 * CHUNK, "more": begun(4 * CHUNK)}
            for start in (0, 2 * CHUNK):
                do(crowd, ("store", 0, wire.Reserve(start=start, tail=False, **lookups)))
            assert len(crowd.decider) == 4
            say(crowd, 0, 1, wire.Lookup(owner="a", **lookups))
            found = crowd.answered[-1].body
            assert (len(found.slots), found.tokens, found.asked) == (2, 2 * CHUNK, 2 * CHUNK)

    def test_more_lookups_than_anybody_makes(self, monkeypatch):
        monkeypatch.setattr(sessions, "MAX_LOOKUPS", 3)
        with Crowd() as crowd:
            lookups = {"sequence": 1, "stop": CHUNK, "more": begun(CHUNK)}
            do(crowd, ("store", 0, wire.Reserve(start=0, tail=False, **lookups)))
            for _ in range(3):
                say(crowd, 0, 1, wire.Lookup(owner="a", **lookups))
            [session] = crowd.service.sessions.values()
            for hit in session.hits.values():
                crowd.decider.release(hit.lease)  # as if its deadline had passed
            say(crowd, 0, 1, wire.Lookup(owner="b", **lookups))
            assert len(session.hits) == 1
            for owner in "cd":
                say(crowd, 0, 1, wire.Lookup(owner=owner, **lookups))
            assert crowd.answered[-1].body == wire.Unknown("more than 3 lookups")

    def test_a_reason_of_any_length_arrives(self):
        with Crowd() as crowd:
            crowd.engines[0].ranks[0].close()
            engine = crowd.engines[0]
            engine.ranks = [
                rig.Rank(crowd._workshop, engine.id, number, page_tokens=10**9 + number)
                for number in range(500)
            ]
            crowd.handle(0, crowd.attach(0))
            [answer] = crowd.answered
            assert answer.body.why.startswith("movers have pages of [1000000000, 1000000001,")
            assert len(answer.body.why) == wire.MAX_TEXT


def begun(tokens):
    return wire.More(root=bytes(32), tokens=tokens_of(0, 0, tokens))


class TestFuzzing:
    @pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None,
        reason="atheris is not installed: there is no wheel of it for this Python and machine",
    )
    def test_a_few_seconds_of_it_find_nothing(self, tmp_path):
        target = ROOT / "tests" / "fuzz" / "fuzz_wire.py"
        options = ["-atheris_runs=5000", "-max_total_time=6", "-seed=1", "-verbosity=0"]
        found = subprocess.run(
            [sys.executable, str(target), *options, f"-artifact_prefix={tmp_path}/"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert found.returncode == 0, found.stderr[-4000:]
