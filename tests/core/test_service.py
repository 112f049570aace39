"""Engines and a server on real sockets: what one computes another loads, and nobody hangs."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
import time
from array import array
from contextlib import suppress
from functools import partial

import pytest
import rig
from house import House
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mooncake_server import Contributor, Master, needs_mooncake
from redis_server import RedisServer, needs_server
from s3_server import S3Server, needs_s3

from lmcache.backends.memory import MemoryBackend
from lmcache.core import chain as chain_module
from lmcache.core.assembly import open_tier
from lmcache.core.engine import moves_for
from lmcache.core.errors import ConfigError, ServiceError
from lmcache.core.fetch import PLAIN
from lmcache.core.keys import Insert
from lmcache.core.receipts import Reason
from lmcache.core.service import memo as memo_module
from lmcache.core.service import peers, sequences, told, wire
from lmcache.core.service import session as sessions
from lmcache.core.service.client import ATTACH_S, ServiceClient
from lmcache.core.service.lookups import Question
from lmcache.core.service.memo import Memo, take_keys
from lmcache.core.service.stream import parse_endpoint
from lmcache.core.tier import Tier
from lmcache.core.tiers import Tiers
from lmcache.plugins.manager import PluginManager

CHUNK = rig.CHUNK_TOKENS
DEADLINE_S = 1.0


class Engine:
    """An engine's scheduler, with the ranks it sends its steps to."""

    def __init__(self, workshop, endpoint, *, ranks=1, name=None, **said):
        self.id = name or rig.engine_id()
        self.ranks = [rig.Rank(workshop, self.id, number) for number in range(ranks)]
        self.endpoint = endpoint
        self.workshop = workshop
        self.client = None
        self.attach(**said)

    def attach(self, **said):
        about = {"release": "test", "engine": self.id, "name": "test", "movers": len(self.ranks)}
        self.client = ServiceClient.open(
            self.endpoint, wire.Attach(**{**about, **said}), DEADLINE_S
        )
        self.workshop.later(self.client.close)

    def chain(self, sequence, **said):
        return rig.chain(sequence, pages_per_chunk=self.client.geometry.pages_per_chunk, **said)

    def compute(self, sequence, table):
        for rank in self.ranks:
            rank.pages.compute(sequence, table)

    def lookup(self, chain, owner="r"):
        deadline = time.monotonic() + 10
        while (hit := self.client.lookup(owner, chain, len(chain.tokens))) is None:
            assert time.monotonic() < deadline
        return hit

    def run(self, number, stores=(), loads=()):
        """What the ranks do with a step."""
        failed = []
        for rank in self.ranks:
            failed += rank.mover.load(list(loads))[1]
            rank.mover.store(list(stores))
            rank.mover.publish(list(stores))
            rank.mover.finish(number)
        return failed

    def store(self, sequence, table, start=0):
        slots, reason = self.client.reserve(self.chain(sequence), start, len(sequence), tail=True)
        number = self.client.depart(slots, [])
        moves = moves_for(slots, self.client.geometry, table, 0, len(table))
        self.run(number, stores=moves)
        return reason

    def load(self, sequence, table, owner="r"):
        hit = self.lookup(self.chain(sequence), owner)
        number = self.client.depart([], [hit])
        moves = moves_for(hit.slots, self.client.geometry, table, 0, len(table))
        return hit, self.run(number, loads=moves)

    def wrong(self, sequence, table, stop):
        return [page for rank in self.ranks for page in rank.pages.wrong(sequence, table, stop)]


@pytest.fixture
def start(workshop):
    def start(*backends, slots=32, tiers=None, **terms):
        decider = workshop.decider(slots)
        named = [Tier(f"t{i}", backend) for i, backend in enumerate(backends)]
        made_tiers = Tiers(decider, named, **(tiers or {}))
        workshop.later(made_tiers.close)
        house = House(decider, made_tiers, **{"chunk_size": CHUNK, **terms})
        workshop.later(house.close)
        return house

    return start


@pytest.fixture
def house(start):
    return start()


@pytest.fixture
def join(workshop):
    def join(house, **options):
        return Engine(workshop, house.endpoint, **options)

    return join


def known(house):
    """The sequences that the server knows, by number."""
    sessions = house.server.ask(lambda service: list(service.sessions.values()))
    return {number: chain for s in sessions for number, chain in s.sequences.items()}


def overheard(engine, monkeypatch):
    """The messages that an engine sends from now on."""
    sent, link = [], engine.client._link
    send = link._send
    monkeypatch.setattr(link, "_send", lambda number, body: sent.append(body) or send(number, body))
    return sent


class TestSharing:
    def test_what_one_engine_computes_another_loads(self, house, join):
        first, second = join(house), join(house)
        sequence = rig.tokens(3 * CHUNK + 6)
        first.compute(sequence, range(13))
        assert first.store(sequence, range(13)) is Reason.NONE
        rig.wait_until(house.idle)
        hit, failed = second.load(sequence, range(10, 23))
        assert (hit.tokens, failed) == (3 * CHUNK + 4, [])
        assert second.wrong(sequence, range(10, 23), hit.tokens) == []
        rig.wait_until(house.idle)

    def test_ranks_of_one_engine(self, house, join):
        engine = join(house, ranks=3)
        sequence = rig.tokens(2 * CHUNK)
        engine.compute(sequence, range(8))
        engine.store(sequence, range(8))
        hit, failed = engine.load(sequence, range(8, 16))
        assert (hit.tokens, failed) == (2 * CHUNK, [])
        assert engine.wrong(sequence, range(8, 16), hit.tokens) == []

    def test_a_sequence_grows(self, house, join):
        engine = join(house)
        sequence = rig.tokens(5 * CHUNK)
        engine.compute(sequence, range(20))
        chain = engine.chain(sequence[: 2 * CHUNK])
        assert engine.lookup(chain).receipt.reason is Reason.NEVER_STORED
        for chunks in (2, 3, 5):
            chain.tokens.extend(sequence[len(chain.tokens) : chunks * CHUNK])
            slots, _ = engine.client.reserve(chain, 0, chunks * CHUNK, tail=False)
            number = engine.client.depart(slots, [])
            engine.run(number, moves_for(slots, engine.client.geometry, range(20), 0, 20))
        engine.ranks[0].pages.poison()
        hit, failed = engine.load(sequence, range(20), owner="other")
        assert (hit.tokens, failed) == (5 * CHUNK, [])

    def test_the_same_tokens_are_kept_once_and_grow_apart(self, house, join):
        """As memory that nobody has touched yet costs more than to compare."""
        one, other = join(house), join(house)
        sequence = rig.tokens(4 * CHUNK)
        chain, twin = (engine.chain(sequence[: 3 * CHUNK]) for engine in (one, other))
        one.compute(sequence, range(16))
        slots, _ = one.client.reserve(chain, 0, 2 * CHUNK, tail=False)  # told in two parts
        one.run(
            one.client.depart(slots, []), moves_for(slots, one.client.geometry, range(16), 0, 8)
        )
        one.client.reserve(chain, 2 * CHUNK, 3 * CHUNK, tail=False)
        other.lookup(twin)
        sessions = house.server.ask(lambda service: list(service.sessions.values()))
        mine, its = (next(iter(session.sequences.values())) for session in sessions)
        assert mine.tokens is its.tokens
        assert list(mine.tokens) == sequence[: 3 * CHUNK]
        different = other.chain([*sequence[: 3 * CHUNK - 1], sequence[-1]])
        other.lookup(different)
        for engine, more in ((one, sequence), (other, [*sequence[: 3 * CHUNK], *range(CHUNK)])):
            grows = chain if engine is one else twin
            grows.tokens.extend(more[3 * CHUNK :])
            engine.client.reserve(grows, 0, 4 * CHUNK, tail=False)
        assert list(mine.tokens) == sequence
        assert list(its.tokens) == [*sequence[: 3 * CHUNK], *range(CHUNK)]
        assert list(sessions[1].sequences[2].tokens) == list(different.tokens)

    @pytest.mark.parametrize(
        "later",
        [lambda client: client.depart([], []), lambda client: client.release("r", None)],
        ids=["with the next step", "when a request ends"],
    )
    def test_a_sequence_nobody_holds_any_more_is_forgotten(self, house, join, later):
        engine = join(house)
        chain = engine.chain(rig.tokens(CHUNK - 1))
        engine.lookup(chain)
        assert len(known(house)) == 1
        del chain
        later(engine.client)
        rig.wait_until(lambda: not known(house))

    def test_the_last_of_each_beginning_is_kept_for_those_that_begin_alike(
        self, house, join, monkeypatch
    ):
        monkeypatch.setattr(memo_module, "SEQUENCES", 1)
        engine = join(house)
        for seed, length in [(1, 3 * CHUNK), (1, 4 * CHUNK), (2, CHUNK), (3, 5)]:
            engine.lookup(engine.chain(rig.tokens(length, seed)))
            engine.client.release("r", None)
            rig.wait_until(lambda: len(known(house)) == 1)
        assert [len(chain.tokens) for chain in known(house).values()] == [CHUNK]

    def test_of_a_prompt_that_begins_like_another_the_rest_is_sent(self, house, join, monkeypatch):
        engine = join(house)
        sent = overheard(engine, monkeypatch)
        sequence = rig.tokens(6 * CHUNK)
        turns = [sequence[:n] for n in (4 * CHUNK, 4 * CHUNK, 5 * CHUNK + 3)]
        turns.append(sequence[: 2 * CHUNK + 1] + rig.tokens(3 * CHUNK, 5))
        for turn in turns:
            engine.lookup(engine.chain(turn))
        more = [body.more for body in sent if isinstance(body, wire.Lookup)]
        assert [len(said.tokens) // 4 for said in more] == [4 * CHUNK, 0, CHUNK + 3, 3 * CHUNK]
        assert [said.like for said in more] == [
            None,
            wire.Like(1, 4 * CHUNK),
            wire.Like(2, 4 * CHUNK),
            wire.Like(3, 2 * CHUNK + 1),
        ]

    @pytest.mark.parametrize("stored", [True, False])
    def test_a_wrong_guess_is_taken_back(self, house, join, monkeypatch, stored):
        """It differs where nobody looks before the server is asked."""
        monkeypatch.setattr(told, "SAMPLES", 1)
        engine = join(house)
        first = rig.tokens(4 * CHUNK)
        other = [*first[: 2 * CHUNK], 7, *first[2 * CHUNK + 1 :]]
        for sequence in (first, other) if stored else (first,):
            engine.compute(sequence, range(16))
            engine.store(sequence, range(16))
        engine.client.release("r", engine.lookup(engine.chain(first)))
        sent = overheard(engine, monkeypatch)
        hit, failed = engine.load(other, range(16, 32))
        assert (hit.tokens, failed) == ((4 if stored else 2) * CHUNK, [])
        assert engine.wrong(other, range(16, 32), hit.tokens) == []
        lookups = [body for body in sent if isinstance(body, wire.Lookup)]
        assert [len(asked.more.tokens) // 4 for asked in lookups] == [0, 2 * CHUNK]
        assert lookups[0].sequence != lookups[1].sequence
        engine.client.release("r", None)
        rig.wait_until(house.idle)
        # nor is it what the next one is likened to
        engine.lookup(engine.chain(other))
        assert sent[-1].more.like == wire.Like(lookups[1].sequence, 4 * CHUNK)

    def test_where_slower_tiers_would_be_asked_nobody_guesses(self, start, join, monkeypatch):
        """The right chunks would have to wait for those that nobody wants."""
        house = start(MemoryBackend(), slots=16)
        engine = join(house)
        sequence = rig.tokens(4 * CHUNK)
        engine.client.release("r", engine.lookup(engine.chain(sequence)))
        monkeypatch.setattr(engine.client._told, "_guess", None)
        sent = overheard(engine, monkeypatch)
        engine.lookup(engine.chain(sequence))
        assert sent[0].more.like.tokens == 4 * CHUNK

    def test_the_beginning_shows_that_nothing_is_stored(self, house, join, monkeypatch):
        monkeypatch.setattr(told, "BEGINNING", 2 * CHUNK)
        engine = join(house)
        sent = overheard(engine, monkeypatch)
        chain = engine.chain(rig.tokens(6 * CHUNK))
        for _ in range(2):
            receipt = engine.lookup(chain).receipt
            assert (receipt.tokens, receipt.asked) == (0, 6 * CHUNK)
            assert receipt.reason is Reason.NEVER_STORED
        assert [asked.more and len(asked.more.tokens) // 4 for asked in sent] == [2 * CHUNK, None]
        assert house.decider.counters["lookup_tokens"] == 12 * CHUNK

    @pytest.mark.parametrize("stored", [1, 2, 4, 6])
    def test_more_is_told_if_the_beginning_is_stored(self, house, join, monkeypatch, stored):
        monkeypatch.setattr(told, "BEGINNING", 2 * CHUNK)
        first, second = join(house), join(house)
        sequence = rig.tokens(6 * CHUNK)
        first.compute(sequence, range(24))
        first.store(sequence[: stored * CHUNK], range(24))
        rig.wait_until(house.idle)
        hashed = []
        key = chain_module.next_key
        monkeypatch.setattr(chain_module, "next_key", lambda *said: hashed.append(1) or key(*said))
        sent = overheard(second, monkeypatch)
        hit, failed = second.load(sequence, range(4, 28))
        assert (hit.tokens, hit.receipt.asked, failed) == (stored * CHUNK, 6 * CHUNK, [])
        assert second.wrong(sequence, range(4, 28), hit.tokens) == []
        lookups = [body for body in sent if isinstance(body, wire.Lookup)]
        told_of = [len(asked.more.tokens) // 4 for asked in lookups]
        assert told_of == ([2 * CHUNK] if stored == 1 else [2 * CHUNK, 4 * CHUNK])
        # keys that the server knows from another engine are not computed again: only those of the
        # first chunk that is not stored, and of its tails
        assert len(hashed) == (0 if stored == 6 else rig.PAGES_PER_CHUNK)
        assert house.decider.counters["lookup_tokens"] == 6 * CHUNK
        second.client.release("r", None)
        rig.wait_until(house.idle)

    def test_what_begins_like_another_is_told_at_once(self, house, join, monkeypatch):
        monkeypatch.setattr(told, "BEGINNING", CHUNK)
        engine = join(house)
        sequence = rig.tokens(4 * CHUNK)
        engine.lookup(engine.chain(sequence[: 2 * CHUNK - 1]))
        sent = overheard(engine, monkeypatch)
        engine.lookup(engine.chain([*sequence[:CHUNK], *rig.tokens(3 * CHUNK, 5)]))
        [asked] = sent
        assert (asked.more.like.tokens, len(asked.more.tokens) // 4) == (CHUNK, 3 * CHUNK)

    def test_a_server_with_slower_tiers_is_told_all(self, start, join, monkeypatch):
        monkeypatch.setattr(told, "BEGINNING", CHUNK)
        house = start(MemoryBackend(), slots=16)
        engine = join(house)
        sent = overheard(engine, monkeypatch)
        engine.lookup(engine.chain(rig.tokens(4 * CHUNK)))
        assert [len(asked.more.tokens) // 4 for asked in sent] == [4 * CHUNK]
        # for it cannot say at once what is stored
        number, more = engine.client._told.tell(engine.chain(rig.tokens(CHUNK, 7)), CHUNK)
        ask = wire.Lookup(owner="other", sequence=number, more=more, stop=3 * CHUNK)
        assert engine.client._link.call(ask, DEADLINE_S) == wire.Lacking()

    def test_a_server_that_always_lacks_something_has_no_hits(self, house, join, monkeypatch):
        engine = join(house)
        monkeypatch.setattr(sessions.Session, "_lookup", lambda *_: wire.Lacking())
        hit = engine.lookup(engine.chain(rig.tokens(2 * CHUNK)))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.DEGRADED)

    @pytest.mark.parametrize("bad", [-1, 2**32, "x"])
    def test_a_guess_about_what_is_no_token_is_taken_back(self, house, join, bad):
        engine = join(house)
        sequence = rig.tokens(4 * CHUNK)
        engine.compute(sequence, range(16))
        engine.store(sequence, range(16))
        engine.client.release("r", engine.lookup(engine.chain(sequence)))
        place = CHUNK + 2  # where nobody looks before
        wrong = [*sequence[:place], bad, *sequence[place + 1 :]]
        for _ in range(2):
            with pytest.raises((OverflowError, TypeError)):
                engine.client.lookup("r", engine.chain(wrong), len(wrong))
        engine.client.release("r", engine.lookup(engine.chain(sequence)))
        assert not engine.client._link._asked
        rig.wait_until(house.idle)

    def test_a_sequence_may_grow_while_what_was_told_is_being_sent(self, house, join):
        engine = join(house)
        sequence = rig.tokens(4 * CHUNK)
        chain = engine.chain(sequence)
        _, first = engine.client._told.tell(chain, CHUNK)
        _, second = engine.client._told.tell(chain, 4 * CHUNK)
        assert bytes(first.tokens) + bytes(second.tokens) == array("I", sequence).tobytes()

    def test_what_was_made_ready_is_told_as_far_as_asked(self, house, join, monkeypatch):
        monkeypatch.setattr(told, "BEGINNING", CHUNK)
        told_of, sequence = join(house).client._told, rig.tokens(5 * CHUNK)
        chain = rig.chain(list(sequence))
        _, first = told_of.tell(chain, 3 * CHUNK, brief=True)
        assert told_of.confirm(chain, 3 * CHUNK)
        chain.tokens.extend(rig.tokens(CHUNK, 2))
        said = [
            first,
            *(told_of.tell(chain, stop)[1] for stop in (2 * CHUNK, 3 * CHUNK, 6 * CHUNK)),
        ]
        assert [more.at for more in said] == [0, CHUNK, 2 * CHUNK, 3 * CHUNK]
        assert b"".join(more.tokens for more in said) == array("I", chain.tokens).tobytes()

    def test_what_grows_is_counted_as_it_is(self, house, join, monkeypatch):
        engine = join(house)
        memo = engine.client._told._memo
        memo._most_tokens = 5 * CHUNK
        for seed in range(3):
            chain = engine.chain(rig.tokens(4 * CHUNK, seed))
            for stop in (CHUNK, 4 * CHUNK):
                engine.client.reserve(chain, 0, stop, tail=False)
        assert (memo._tokens, len(memo._items)) == (4 * CHUNK, 1)

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_tokens_that_vanish_are_never_made_up(self, house, join, kind):
        engine = join(house)
        told_of, chain = engine.client._told, engine.chain(kind(rig.tokens(2 * CHUNK)))
        told_of.tell(chain, 2 * CHUNK - 6)
        chain.tokens = chain.tokens[: CHUNK + 2]
        for brief in (True, False):
            _, more = told_of.tell(chain, 3 * CHUNK, brief=brief)
            assert more is None or len(more.tokens) == 0
            _, more = told_of.tell(engine.chain(chain.tokens), 3 * CHUNK, brief=brief)
            assert more.like.tokens + len(more.tokens) // 4 == CHUNK + 2

    def test_what_was_told_stays_told_if_tokens_vanish(self, house, join):
        engine = join(house)
        told_of, chain = engine.client._told, engine.chain(rig.tokens(4 * CHUNK))
        told_of.tell(chain, CHUNK)
        whole, chain.tokens = chain.tokens, chain.tokens[: CHUNK - 4]
        _, more = told_of.tell(chain, 4 * CHUNK)
        assert (more.at, len(more.tokens)) == (CHUNK, 0)
        chain.tokens = whole
        _, more = told_of.tell(chain, 4 * CHUNK)
        assert (more.at, len(more.tokens) // 4) == (CHUNK, 3 * CHUNK)

    def test_a_guess_that_could_not_be_sent_is_no_promise(self, house, join, monkeypatch):
        engine = join(house)
        engine.lookup(engine.chain(rig.tokens(2 * CHUNK)))
        chain = engine.chain(rig.tokens(2 * CHUNK))
        begin = engine.client._link.begin

        def fail(body):
            raise ServiceError("on purpose")

        monkeypatch.setattr(engine.client._link, "begin", fail)
        assert engine.client.lookup("x", chain, 2 * CHUNK).receipt.reason is Reason.DEGRADED
        monkeypatch.setattr(engine.client._link, "begin", begin)
        sent = overheard(engine, monkeypatch)
        engine.lookup(chain, "x")
        assert sent[0].more.like.tokens == 2 * CHUNK
        assert engine.client.is_whole()

    @pytest.mark.parametrize("seed", range(8))
    def test_the_server_knows_what_it_was_told_whatever_came_before(
        self, house, join, monkeypatch, seed
    ):
        """Prompts that share stretches, grow, end, and differ in salts and inserts."""
        monkeypatch.setattr(memo_module, "SEQUENCES", 3)
        monkeypatch.setattr(told, "SAMPLES", 2)
        monkeypatch.setattr(told, "BEGINNING", CHUNK if seed % 2 else told.BEGINNING)
        rng = random.Random(seed)
        engine, live = join(house), []
        for turn in range(100):
            if len(live) > 4:
                live.pop(rng.randrange(5))
                engine.client.release("r", None)
            sequence = rig.tokens(rng.randrange(3 * CHUNK), rng.randrange(2))
            sequence += rig.tokens(rng.randrange(3 * CHUNK), rng.randrange(2))
            inserts = [Insert("x", rng.randrange(40), 9)] if rng.random() < 0.2 else []
            salt = rng.choice(["", "", "", "other"])
            live.append(engine.chain(sequence, salt=salt, inserts=inserts))
            for chain in (rng.choice(live), live[-1]):
                chain.tokens.extend(rig.tokens(rng.choice([0, 0, 5, CHUNK]), turn))
                stop = rng.randrange(len(chain.tokens) + 1)
                if rng.random() < 0.5:
                    engine.client.reserve(chain, 0, stop, tail=False)
                else:
                    engine.client.lookup("r", chain, stop)
                    engine.client.release("r", None)
            sequences = known(house)
            for chain in live:
                ours = engine.client._told._of[chain]
                theirs = sequences[ours.number]
                assert list(theirs.tokens) == chain.tokens[: len(ours.tokens)]
                expected = engine.chain(chain.tokens, salt=salt, inserts=chain.inserts)
                expected._keys = [chain.root]
                keys = [chain.root, *expected.full(len(theirs.tokens))]
                assert theirs._keys == keys[: len(theirs._keys)]
        assert engine.client.is_whole()

    @pytest.mark.parametrize(
        "kind", [list, tuple, partial(array, "I")], ids=["list", "tuple", "array"]
    )
    def test_tokens_of_any_sequence_type_are_told_as_far_as_asked(self, house, join, kind):
        engine = join(house)
        tokens = rig.tokens(3 * CHUNK)
        chain = engine.chain(kind(tokens))
        for stop in (CHUNK + 1, 2 * CHUNK + 3):
            engine.client.reserve(chain, 0, stop, tail=False)
            assert house.server.ask(
                lambda service: [
                    list(told.tokens)
                    for session in service.sessions.values()
                    for told in session.sequences.values()
                ]
            ) == [list(tokens[:stop])]

    def test_the_reason_of_a_miss_arrives(self, start, join):
        house = start(slots=2)
        engine = join(house)
        for seed in range(3):
            engine.compute(rig.tokens(CHUNK, seed), range(4))
            engine.store(rig.tokens(CHUNK, seed), range(4))
        hit = engine.lookup(engine.chain(rig.tokens(CHUNK)))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.EVICTED)

    def test_a_slower_tier_is_read_while_the_engine_goes_on(self, start, join):
        backend = MemoryBackend()
        house = start(backend, slots=4)
        engine = join(house)
        sequence = rig.tokens(2 * CHUNK)
        engine.compute(sequence, range(8))
        engine.store(sequence, range(8))
        rig.wait_until(house.idle)
        house.server.service.tiers.flush()
        house.server.ask(lambda service: service.decider.clear())
        hit, failed = engine.load(sequence, range(8, 16))
        assert (hit.tokens, failed) == (2 * CHUNK, [])
        assert hit.receipt.by_tier == {"l1": 0, "t0": 2 * CHUNK}
        assert engine.wrong(sequence, range(8, 16), hit.tokens) == []
        engine.client.release("r", None)
        rig.wait_until(house.idle)

    def test_many_at_once(self, start, join):
        """Each of them on a thread of its own, over a slab much too small for all."""
        house = start(slots=12)
        engines = [join(house) for _ in range(8)]
        wrong = []

        def work(engine, seed):
            for turn in range(12):
                sequence = rig.tokens(2 * CHUNK, (seed + turn) % 5)
                engine.compute(sequence, range(8))
                engine.store(sequence, range(8))
                for rank in engine.ranks:
                    rank.pages.poison()
                hit, failed = engine.load(sequence, range(8, 16), owner=str(turn))
                wrong.extend(failed)
                wrong.extend(engine.wrong(sequence, range(8, 16), hit.tokens))

        threads = [
            threading.Thread(target=work, args=(engine, seed))
            for seed, engine in enumerate(engines)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        rig.wait_until(house.idle)


class TestTwoServers:
    """Each with memory of its own, and one store behind both."""

    @pytest.fixture(
        params=[
            "file",
            pytest.param("redis", marks=needs_server),
            pytest.param("s3", marks=needs_s3),
            pytest.param("mooncake", marks=needs_mooncake),
        ]
    )
    def store(self, request, tmp_path):
        """Opens it, each time it is called."""
        programs = []
        if request.param == "file":
            url = f"file://{tmp_path}/store"
        elif request.param == "mooncake":
            programs.append(Master(tmp_path))
            programs.append(Contributor(tmp_path, programs[0]))
            url = programs[0].url
        else:
            programs.append({"redis": RedisServer, "s3": S3Server}[request.param](tmp_path))
            url = programs[0].url
        yield lambda: open_tier(url, PluginManager()).backend
        for program in reversed(programs):
            program.kill()

    def test_what_one_was_given_the_other_finds(self, start, join, store):
        houses = [start(store()) for _ in range(2)]
        first, second = map(join, houses)
        sequence = rig.tokens(2 * CHUNK + 6)
        first.compute(sequence, range(10))
        first.store(sequence, range(10))
        rig.wait_until(houses[0].idle)
        houses[0].server.service.tiers.flush()
        hit, failed = second.load(sequence, range(10, 20))
        assert (hit.tokens, failed) == (2 * CHUNK + 4, [])
        assert hit.receipt.by_tier == {"l1": 0, "t0": 2 * CHUNK + 4}
        assert second.wrong(sequence, range(10, 20), hit.tokens) == []
        assert second.lookup(second.chain(sequence, salt="other"), "o").tokens == 0


class TestLeases:
    def test_what_is_released_is_free(self, house, join):
        engine = join(house)
        sequence = rig.tokens(CHUNK)
        engine.compute(sequence, range(4))
        engine.store(sequence, range(4))
        hit = engine.lookup(engine.chain(sequence))
        assert len(house.decider.leases) == 1
        assert engine.client.keeps(hit)
        engine.client.release("r", hit)
        rig.wait_until(lambda: len(house.decider.leases) == 0)

    @pytest.mark.parametrize("heard", [False, True], ids=["on its way", "here already"])
    def test_an_answer_nobody_asked_for_again_is_given_back(self, house, join, heard):
        engine = join(house)
        sequence = rig.tokens(CHUNK)
        engine.compute(sequence, range(4))
        engine.store(sequence, range(4))
        chain, link = engine.chain(sequence), engine.client._link
        asked = engine.client._lookups._ask(Question("hung up", chain, CHUNK, PLAIN))
        if heard:
            number = asked.number
            rig.wait_until(lambda: link.look() and link._asked[number])
        engine.client.release("hung up", None)
        rig.wait_until(lambda: engine.client.is_whole() and house.idle())

    def test_what_is_cancelled_is_free(self, house, join):
        engine = join(house)
        slots, _ = engine.client.reserve(
            engine.chain(rig.tokens(2 * CHUNK)), 0, 2 * CHUNK, tail=False
        )
        assert house.decider.free_bytes < house.decider.capacity_bytes
        engine.client.cancel(slots, [])
        rig.wait_until(lambda: house.decider.free_bytes == house.decider.capacity_bytes)

    def test_a_step_whose_leases_are_gone_counts_all_the_same(self, house, join):
        engine = join(house)
        sequence = rig.tokens(CHUNK)
        engine.compute(sequence, range(4))
        engine.store(sequence, range(4))
        hit = engine.lookup(engine.chain(sequence))
        engine.client.release("r", hit)
        assert engine.client.depart([], [hit]) == 2
        engine.ranks[0].mover.finish(2)
        engine.store(rig.tokens(CHUNK, 1), range(4))
        assert engine.load(rig.tokens(CHUNK, 1), range(4))[0].tokens == CHUNK
        assert engine.client.is_whole()

    def test_a_promise_outlives_the_deadline(self, workshop, join):
        clock = rig.Clock()
        decider = workshop.decider(8, clock=clock, lease_s=5.0)
        house = House(decider, Tiers(decider, []), chunk_size=CHUNK)
        workshop.later(house.close)
        engine = join(house)
        sequence = rig.tokens(CHUNK)
        engine.compute(sequence, range(4))
        engine.store(sequence, range(4))
        chain = engine.chain(sequence)
        hit = engine.lookup(chain)
        other = engine.lookup(chain, "other")
        assert engine.client.keeps(hit, promised=True)
        engine.lookup(engine.chain(rig.tokens(CHUNK, 9)), "third")  # so that it has been heard
        clock.now += 6
        engine.lookup(engine.chain(rig.tokens(CHUNK, 8)), "fourth")
        assert [lease.number for lease in decider.leases] == [hit.lease.number]
        engine.client.release("other", other)
        engine.client.release("r", hit)
        rig.wait_until(house.idle)


class TestComingAndGoing:
    def test_an_engine_that_detaches_leaves_nothing(self, house, join):
        engine = join(house)
        sequence = rig.tokens(CHUNK)
        engine.compute(sequence, range(4))
        engine.store(sequence, range(4))
        engine.lookup(engine.chain(sequence))
        engine.client.reserve(engine.chain(rig.tokens(CHUNK, 2)), 0, CHUNK, tail=False)
        engine.client.close()
        rig.wait_until(lambda: not house.sessions() and house.idle())
        rig.assert_idle(house.decider)

    def test_an_engine_whose_rank_dies_leaves_nothing(self, house, join):
        engine = join(house, ranks=2)
        slots, _ = engine.client.reserve(engine.chain(rig.tokens(CHUNK, 2)), 0, CHUNK, tail=False)
        engine.client.depart(slots, [])
        engine.ranks[1].door.close()
        rig.wait_until(lambda: not house.sessions())
        rig.wait_until(lambda: house.decider.free_bytes == house.decider.capacity_bytes)
        rig.wait_until(lambda: not engine.client.is_whole())

    def test_an_engine_attaches_anew(self, house, join):
        engine = join(house)
        sequence = rig.tokens(CHUNK)
        engine.compute(sequence, range(4))
        engine.store(sequence, range(4))
        engine.client.reserve(engine.chain(rig.tokens(CHUNK, 2)), 0, CHUNK, tail=False)
        before = engine.client
        engine.attach()
        rig.wait_until(lambda: not before.is_whole())
        hit, failed = engine.load(sequence, range(4, 8))
        assert (hit.tokens, failed) == (CHUNK, [])
        assert house.sessions() == 1
        rig.wait_until(house.idle)

    def test_a_server_that_is_gone_costs_nothing(self, house, join):
        engine = join(house)
        sequence = rig.tokens(CHUNK)
        chain = engine.chain(sequence)
        house.close()
        rig.wait_until(lambda: not engine.client.is_whole())
        started = time.monotonic()
        assert engine.client.lookup("r", chain, CHUNK).receipt.reason is Reason.DEGRADED
        assert engine.client.reserve(chain, 0, CHUNK, tail=False) == ([], Reason.DEGRADED)
        engine.client.cancel([], [])
        engine.client.release("r", None)
        assert time.monotonic() - started < 0.5

    def test_a_server_that_dies_while_an_engine_attaches(self):
        """The engine must not wait for its answer: the next server may be up already."""
        stub = socket.create_server(("127.0.0.1", 0))
        port = stub.getsockname()[1]

        def die():
            with stub, stub.accept()[0] as sock:
                sock.recv(4096)

        dying = threading.Thread(target=die)
        dying.start()
        about = wire.Attach(release="test", engine="e", name="test", movers=1)
        started = time.monotonic()
        with pytest.raises(ServiceError, match="is gone"):
            ServiceClient.open(f"tcp://127.0.0.1:{port}", about, DEADLINE_S)
        dying.join()
        assert time.monotonic() - started < ATTACH_S / 3

    def test_nobody_listens(self, workshop):
        with pytest.raises(ServiceError, match="no server listens on tcp://127.0.0.1:9"):
            Engine(workshop, "tcp://127.0.0.1:9")

    def test_all_words_are_given_back(self, house, join):
        for _ in range(5):
            engine = join(house, ranks=2)
            engine.client.close()
            rig.wait_until(lambda: not house.sessions())
        rig.wait_until(lambda: house.server.ask(lambda service: len(service._words)) == 1024)


class TestTerms:
    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"protocol": 1}, r"house\) speaks protocol 2, the engine speaks 1"),
            ({"chunk_size": 99}, "chunks are 16 tokens, the engine was told to use 99"),
            ({"mode": "teleport"}, "the engine wants teleport, the server does engine_driven"),
            ({"token": "guess"}, "the token is not the server's"),
        ],
    )
    def test_an_engine_that_cannot_be_served_is_told_why(self, house, join, said, message):
        with pytest.raises(ConfigError, match=message):
            join(house, **said)
        assert house.sessions() == 0

    def test_a_token(self, start, join):
        house = start(token="secret")
        with pytest.raises(ConfigError, match="the token is not the server's"):
            join(house)
        assert join(house, token="secret").client.is_whole()

    def test_a_port_that_is_taken(self, house):
        with pytest.raises(ServiceError, match="cannot listen on"):
            House(house.decider, Tiers(house.decider, []), endpoint=house.endpoint)

    def test_movers_that_do_not_answer(self, house, join):
        with pytest.raises(ServiceError, match="refuses: no mover answers"):
            join(house, ranks=1, movers=2)
        rig.wait_until(lambda: house.server.ask(lambda service: len(service._words)) == 1024)


class TestLike:
    """What an engine says of sequences that begin like others, put together by hand."""

    @pytest.fixture
    def tell(self, house, join):
        link = join(house).client._link

        def tell(number, tokens, stop=None, *, at=0, salt="", inserts=(), like=None):
            known = at + (like.tokens if like else 0)
            more = wire.More(
                root=rig.chain([], salt=salt).root,
                shown=[wire.Shown(i.identifier, i.offset, i.length) for i in inserts],
                at=at,
                like=like,
                tokens=array("I", tokens).tobytes(),
            )
            stop = known + len(tokens) if stop is None else stop
            call = wire.Reserve(sequence=number, more=more, start=0, stop=stop, tail=False)
            answer = link.call(call, DEADLINE_S)
            return [s.key for s in answer.slots] if isinstance(answer, wire.Reserved) else answer

        return tell

    @pytest.mark.parametrize(
        "said", [{"salt": "other"}, {"inserts": [Insert("x", 3, 2)]}], ids=["root", "inserts"]
    )
    def test_tokens_are_taken_over_and_keys_only_if_all_is_alike(self, tell, said):
        sequence = rig.tokens(4 * CHUNK)
        assert tell(1, sequence[: 2 * CHUNK]) == list(rig.chain(sequence).full(2 * CHUNK))
        keys = tell(2, sequence[2 * CHUNK :], like=wire.Like(1, 2 * CHUNK), **said)
        assert keys == list(rig.chain(sequence, **said).full(4 * CHUNK))

    def test_a_sequence_may_begin_like_the_one_it_takes_the_place_of(self, tell):
        sequence = rig.tokens(3 * CHUNK)
        tell(1, sequence)
        other = sequence[:CHUNK] + rig.tokens(CHUNK, 2)
        [key] = tell(1, other[CHUNK:], like=wire.Like(1, CHUNK))
        assert key == rig.chain(other).key(1)

    @pytest.mark.parametrize(
        ("said", "what"),
        [
            ({"like": wire.Like(2, CHUNK)}, "the sequence that another is like"),
            ({"like": wire.Like(1, 2 * CHUNK + 1)}, "the sequence that another is like"),
            ({"like": wire.Like(1, CHUNK), "at": 2 * CHUNK}, "the beginning of a sequence"),
        ],
        ids=["unknown", "longer than it is", "of one that goes on"],
    )
    def test_what_cannot_be_is_not_taken(self, tell, said, what):
        tell(1, rig.tokens(2 * CHUNK))
        assert tell(1, rig.tokens(CHUNK), CHUNK, **said) == wire.Unknown(what)

    def test_tokens_that_are_taken_over_count(self, tell, monkeypatch):
        monkeypatch.setattr(sequences, "MAX_KNOWN_TOKENS", 5 * CHUNK)
        for number in (1, 1, 2, 2):  # what was told before in their place counts no more
            tell(number, rig.tokens(2 * CHUNK))
        assert isinstance(tell(3, [], like=wire.Like(1, CHUNK)), list)
        answer = tell(4, [], like=wire.Like(1, CHUNK))
        assert answer == wire.Unknown(f"more than {5 * CHUNK} tokens in all")


class TestMemo:
    """Keys that are taken over must be those that would have been computed."""

    @pytest.mark.parametrize("common", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK])
    @pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, 3 * CHUNK + 5, 5 * CHUNK])
    def test_a_sequence_that_begins_like_another(self, common, length):
        memo = Memo(10**6)
        first, second = rig.tokens(5 * CHUNK, 1), rig.tokens(5 * CHUNK, 1)[:common]
        second = (second + rig.tokens(5 * CHUNK, 2))[:length]
        for sequence in (first, second, second, first):
            chain = rig.chain(array("I", sequence))
            take_keys(memo, chain)
            assert list(chain.full(len(sequence))) == list(rig.chain(sequence).full(len(sequence)))

    def test_another_root_shares_nothing(self):
        memo = Memo(10**6)
        sequence = array("I", rig.tokens(3 * CHUNK))
        for salt in ("", "other"):
            chain = rig.chain(sequence, salt=salt)
            take_keys(memo, chain)
            expected = rig.chain(list(sequence), salt=salt)
            assert list(chain.full(3 * CHUNK)) == list(expected.full(3 * CHUNK))

    def test_it_is_bounded(self, monkeypatch):
        monkeypatch.setattr(memo_module, "SEQUENCES", 4)
        memo = Memo(10**6)
        for seed in range(20):
            take_keys(memo, rig.chain(array("I", rig.tokens(2 * CHUNK, seed // 2))))
        assert len(memo._items) == 4
        assert memo._tokens == 4 * 2 * CHUNK
        memo._most_tokens = 3 * CHUNK
        take_keys(memo, rig.chain(array("I", rig.tokens(2 * CHUNK, 11))))
        assert len(memo._items) == 1
        assert memo._tokens == 2 * CHUNK


PING = wire.encode(wire.Call(1, 0, wire.Ping()))


def framed(message):
    return struct.pack("<I", len(message)) + message


def connected(house):
    """A bare socket to the server."""
    return socket.create_connection(parse_endpoint(house.endpoint), 5.0)


def is_answered(sock):
    sock.sendall(framed(PING))
    return bool(sock.recv(4096))


class TestFloods:
    @pytest.mark.parametrize("reads", [True, False])
    def test_peers_take_turns(self, house, join, reads):
        """Whoever sends without an end holds up nobody else, nor does who reads no answers."""
        engine = join(house)
        sequence = rig.tokens(2 * CHUNK)
        engine.compute(sequence, range(8))
        sent, is_over = [], threading.Event()

        def flood():
            with connected(house) as sock:
                sock.settimeout(0.01)
                while not is_over.is_set():
                    with suppress(TimeoutError):
                        sock.sendall(framed(PING))
                        sent.append(1)
                        while reads and not len(sent) % 100 and sock.recv(1 << 16):
                            pass

        floods = [threading.Thread(target=flood) for _ in range(3)]
        for thread in floods:
            thread.start()
        try:
            rig.wait_until(lambda: len(sent) > 5000)
            before = len(sent)
            for number in range(20):
                assert engine.store(rig.tokens(CHUNK, number), range(4)) is Reason.NONE
            assert not reads or len(sent) > before
            assert engine.store(sequence, range(8)) is Reason.NONE
            hit, failed = engine.load(sequence, range(8, 16))
            assert (hit.tokens, failed) == (2 * CHUNK, [])
        finally:
            is_over.set()
            for thread in floods:
                thread.join()

    def test_who_does_not_take_answers_is_not_answered_more(self, house):
        """The server keeps no more for it than the answer that did not fit."""
        theirs = house.server._peers
        with connected(house) as sock:
            sock.settimeout(0.2)
            count = 0
            with suppress(TimeoutError):
                while True:
                    sock.sendall(framed(PING) * 1000)
                    count += 1000
            [stream] = house.server.ask(lambda service: list(theirs._streams.values()))
            assert 0 < len(stream._unsent) < 1 << 12
            sock.settimeout(10)
            pong = wire.Answer(1, house.server.service.boot, wire.Pong("house"))
            left = count * len(framed(wire.encode(pong)))
            while left > 0:
                left -= len(sock.recv(1 << 20))
            assert not stream._unsent


class TestPeers:
    @pytest.mark.parametrize(
        "data", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, struct.pack("<I", wire.MAX_MESSAGE + 1)]
    )
    def test_who_speaks_another_language_is_parted_with(self, house, join, data):
        with connected(house) as sock:
            sock.sendall(data)
            assert sock.recv(4096) == b""
        assert join(house).store(rig.tokens(CHUNK), range(4)) is Reason.NONE

    @settings(
        max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.binary(max_size=200))
    def test_whatever_is_said_the_server_goes_on(self, house, data):
        with connected(house) as sock:
            sock.sendall(data)
        with connected(house) as sock:
            assert is_answered(sock)

    def test_there_are_only_so_many(self, house, monkeypatch):
        monkeypatch.setattr(peers, "MAX_PEERS", 2)
        with connected(house) as first, connected(house) as second:
            assert is_answered(first)
            assert is_answered(second)
            with connected(house) as third:
                assert third.recv(4096) == b""
        rig.wait_until(lambda: not house.server._peers._streams)
        with connected(house) as fourth:
            assert is_answered(fourth)

    def test_without_descriptors_nobody_is_let_in_until_there_are_some(self, house, warnings):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as sock, socket.socket() as last:
            sock.settimeout(10)
            resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, hard))
            try:
                fill = []
                with suppress(OSError):
                    while True:
                        fill.append(os.dup(0))
                sock.connect(parse_endpoint(house.endpoint))
                rig.wait_until(lambda: warnings)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in fill:
                    os.close(fd)
            assert "cannot let an engine in" in warnings[0]
            assert is_answered(sock)

    def test_an_answer_that_comes_after_its_peer_left(self, house):
        house.server.ask(lambda service: house.server._peers.send(999, b"late"))


class TestErrorsOfOurOwn:
    def test_one_engines_trouble_is_not_anothers(self, house, join, monkeypatch):
        engine, other = join(house), join(house)

        def fail(*args, **kwargs):
            raise AssertionError("on purpose")

        session = house.server.ask(lambda service: service.sessions[engine.client.number])
        monkeypatch.setattr(session.attachment, "reserve", fail)
        chain = engine.chain(rig.tokens(CHUNK))
        assert engine.client.reserve(chain, 0, CHUNK, tail=False) == ([], Reason.DEGRADED)
        assert other.store(rig.tokens(CHUNK), range(4)) is Reason.NONE
        rig.wait_until(lambda: not engine.client.is_whole())
        engine.attach()
        assert engine.store(rig.tokens(CHUNK, 2), range(4)) is Reason.NONE

    def test_the_serving_thread_goes_on(self, house, join, monkeypatch):
        calls = []

        def fail():
            calls.append(1)
            raise AssertionError("on purpose")

        monkeypatch.setattr(house.server.service, "sweep", fail)
        rig.wait_until(lambda: len(calls) > 1)
        assert join(house).store(rig.tokens(CHUNK), range(4)) is Reason.NONE
