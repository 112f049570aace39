"""One engine of several movers, joined to a decider and left by it, without a trace."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import pytest
import rig

from lmcache.backends.memory import MemoryBackend
from lmcache.core.attachment import Attachment, geometry_of
from lmcache.core.engine import moves_for
from lmcache.core.errors import BackendError, ConfigError, HandoverError, PluginError
from lmcache.core.geometry import Geometry, combined_layout
from lmcache.core.handover import Door, address_of
from lmcache.core.joining import Joining
from lmcache.core.layout import fingerprint_of
from lmcache.core.receipts import Reason
from lmcache.core.slab import MAX_MOVERS
from lmcache.core.tier import Tier
from lmcache.core.tiers import Tiers

CHUNK = rig.CHUNK_TOKENS


class Engine:
    """The scheduling side: what an adapter does with an attachment, step by step."""

    def __init__(self, attachment):
        self.cache = attachment
        self.step = 0

    def chain(self, sequence):
        return rig.chain(sequence, pages_per_chunk=self.cache.geometry.pages_per_chunk)

    def plan_store(self, sequence, table):
        slots, reason = self.cache.decider.reserve(
            self.chain(sequence), self.cache.geometry, 0, len(sequence), tail=True
        )
        number = self.cache.flights.depart(slots, [], [])
        return number, moves_for(slots, self.cache.geometry, table, 0, len(table)), reason

    def plan_load(self, sequence, table):
        hit = self.cache.tiers.lookup("r", self.chain(sequence), self.cache.geometry, len(sequence))
        number = self.cache.flights.depart([], [hit.lease] if hit.lease else [], hit.slots)
        return number, moves_for(hit.slots, self.cache.geometry, table, 0, len(table)), hit

    def store(self, ranks, sequence, table):
        number, moves, reason = self.plan_store(sequence, table)
        for rank in ranks:
            rank.mover.store(moves)
            rank.mover.publish(moves)
            rank.mover.finish(number)
        self.cache.flights.settle()
        return reason

    def load(self, ranks, sequence, table):
        number, moves, hit = self.plan_load(sequence, table)
        failed = []
        for rank in ranks:
            failed += rank.mover.load(moves)[1]
            rank.mover.finish(number)
        self.cache.flights.settle()
        return hit, failed


@pytest.fixture
def engine():
    return rig.engine_id()


@pytest.fixture
def made():
    """The deciders and tiers that were built."""
    return []


@pytest.fixture
def build(made):
    def build(geometry):
        decider = rig.decider(8)
        made.append((decider, Tiers(decider, [])))
        return made[-1]

    return build


@pytest.fixture
def attach(workshop, engine, build):
    def attach(movers, *, chunk_size=CHUNK, timeout_s=2.0):
        attachment = Attachment.open(engine, movers, chunk_size, build, timeout_s)
        workshop.later(attachment.close)
        workshop.later(attachment.decider.slab.close)
        return attachment

    return attach


class TestGeometry:
    def test_slices_come_in_their_order_whatever_the_movers_order(self):
        hellos = [rig.hello(0, slice_index=1), rig.hello(1, slice_index=0)]
        made = geometry_of([replace_hello(h, page_bytes=100 + h.number) for h in hellos], CHUNK)
        assert made.slices == (101, 100)
        assert made.page_bytes == 201

    @pytest.mark.parametrize(
        ("chunk_size", "pages"),
        [(1, 1), (3, 1), (4, 1), (5, 2), (CHUNK, 4), (CHUNK + 1, 5), (256, 64)],
    )
    def test_a_chunk_is_whole_pages(self, chunk_size, pages):
        assert geometry_of([rig.hello()], chunk_size).pages_per_chunk == pages

    def test_the_layout_is_that_of_all_slices_in_order(self):
        hellos = [replace_hello(rig.hello(n), summary=f"f{n}") for n in range(3)]
        assert geometry_of(hellos, CHUNK).layout == combined_layout(
            [fingerprint_of(f"f{n}") for n in range(3)]
        )
        assert combined_layout(["f0", "f1"]) != combined_layout(["f1", "f0"])
        assert combined_layout(["f0"]) != combined_layout(["f0", "f0"])

    @pytest.mark.parametrize(
        ("hellos", "message"),
        [
            ([rig.hello(0), rig.hello(1, page_tokens=8)], "pages of [4, 8] tokens"),
            ([rig.hello(0, page_tokens=0)], "pages of [0] tokens"),
            (
                [rig.hello(0), rig.hello(1, slice_index=0, summary="other")],
                "movers 0 and 1 hold one slice in two layouts",
            ),
            (
                [rig.hello(0), rig.hello(1), rig.hello(2, slice_index=1, page_bytes=7)],
                "movers 1 and 2 hold one slice in two layouts",
            ),
            ([rig.hello(0), rig.hello(1, slice_index=2)], "slices [0, 2]; some are missing"),
            ([rig.hello(0, slice_index=1)], "slices [1]; some are missing"),
            ([rig.hello(0, slice_index=-1)], "some are missing"),
            (
                [rig.hello(n, slice_index=0) for n in range(MAX_MOVERS + 1)],
                f"words for {MAX_MOVERS}",
            ),
        ],
        ids=[
            "tokens",
            "no tokens",
            "layouts",
            "bytes",
            "a slice is missing",
            "the first slice is missing",
            "no slice",
            "too many",
        ],
    )
    def test_movers_that_cannot_share_are_refused_by_name(self, hellos, message):
        with pytest.raises(HandoverError) as error:
            geometry_of(hellos, CHUNK)
        assert message in str(error.value)

    def test_too_many_slices(self):
        with pytest.raises(ConfigError, match="65 slices; between 1 and 64 fit"):
            Geometry(4, 4, (1,) * 65, bytes(32))
        with pytest.raises(ConfigError):
            Geometry(4, 4, (), bytes(32))

    def test_the_payload_of_a_slice_begins_where_the_one_before_ends(self):
        made = Geometry(4, 4, (10, 20, 30), bytes(32))
        starts = [made.payload_offset(index, 3) for index in range(3)]
        assert starts == [4736, 4736 + 30, 4736 + 90]
        assert made.slot_bytes(3) == 4736 + 180
        assert [made.tag_offset(index) for index in range(3)] == [128, 136, 144]


def replace_hello(hello, **changes):
    return type(hello)(**{**{f: getattr(hello, f) for f in hello.__struct_fields__}, **changes})


class TestSlices:
    """TP=2: each rank holds its heads of every page, and one object holds both."""

    @pytest.fixture
    def ranks(self, workshop, engine):
        return [rig.Rank(workshop, engine, number) for number in range(2)]

    def test_a_round_trip(self, ranks, attach):
        engine = Engine(attach(2))
        assert [rank.grant.writes for rank in ranks] == [True, True]
        sequence, table = rig.tokens(2 * CHUNK + 5), list(range(8, 18))
        for rank in ranks:
            rank.pages.compute(sequence, table)
        assert engine.store(ranks, sequence, table) is Reason.NONE
        for rank in ranks:
            rank.pages.poison()
        hit, failed = engine.load(ranks, sequence, range(10))
        assert (hit.tokens, failed) == (2 * CHUNK + 4, [])
        for rank in ranks:
            assert rank.pages.wrong(sequence, range(10), hit.tokens) == []
            assert rank.pages.untouched(except_for=range(9))
        rig.assert_idle(engine.cache.decider)

    def test_the_ranks_hold_different_bytes(self, ranks, attach):
        Engine(attach(2))
        sequence = rig.tokens(CHUNK)
        for rank in ranks:
            rank.pages.compute(sequence, range(4))
        assert ranks[0].pages.read(0) != ranks[1].pages.read(0)

    def test_half_an_object_is_no_hit(self, ranks, attach):
        engine = Engine(attach(2))
        sequence = rig.tokens(CHUNK)
        number, moves, _ = engine.plan_store(sequence, range(4))
        ranks[0].mover.store(moves)
        ranks[0].mover.publish(moves)
        for rank in ranks:
            rank.mover.finish(number)
        engine.cache.flights.settle()
        hit = engine.load(ranks, sequence, range(4))[0]
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.NEVER_STORED)
        rig.assert_idle(engine.cache.decider)

    def test_nothing_is_committed_before_the_slowest_rank_has_answered(self, ranks, attach):
        engine = Engine(attach(2))
        sequence = rig.tokens(CHUNK)
        number, moves, _ = engine.plan_store(sequence, range(4))
        for rank in ranks:
            rank.mover.store(moves)
            rank.mover.publish(moves)
        ranks[1].mover.finish(number)
        engine.cache.flights.settle()
        assert len(engine.cache.decider) == 0
        ranks[0].mover.finish(number)
        engine.cache.flights.settle()
        assert len(engine.cache.decider) == 1

    def test_the_ranks_go_at_their_own_pace(self, ranks, attach):
        """Twenty steps in the air; each rank works through them on a thread of its own."""
        engine = Engine(attach(2))
        steps = []
        for seed in range(20):
            sequence = rig.tokens(CHUNK, seed % 6)
            for rank in ranks:
                rank.pages.compute(sequence, range(4 * (seed % 6), 4 * (seed % 6) + 4))
            steps.append(engine.plan_store(sequence, range(4 * (seed % 6), 4 * (seed % 6) + 4)))

        def work(rank):
            for number, moves, _ in steps:
                time.sleep(0.001 * rank.number)
                rank.mover.store(moves)
                rank.mover.publish(moves)
                rank.mover.finish(number)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        while len(engine.cache.flights):
            engine.cache.flights.settle()
        for thread in threads:
            thread.join()
        for seed in range(6):
            hit, failed = engine.load(ranks, rig.tokens(CHUNK, seed), range(24, 28))
            assert (hit.tokens, failed) == (CHUNK, [])
            for rank in ranks:
                assert rank.pages.wrong(rig.tokens(CHUNK, seed), range(24, 28), CHUNK) == []
        rig.assert_idle(engine.cache.decider)


class TestSeveralEngines:
    """Two engines of two ranks each, and one decider that outlives them."""

    @pytest.fixture
    def shared(self, workshop):
        return pair(workshop.decider(8))

    @pytest.fixture
    def join(self, workshop, shared):
        def join(name, words):
            ranks = [rig.Rank(workshop, name, number) for number in range(2)]
            made = Attachment.open(name, 2, CHUNK, lambda g: shared, 2.0, words=words)
            workshop.later(made.close)
            return ranks, Engine(made)

        return join

    def test_one_computes_and_the_other_loads(self, engine, join, shared):
        (ranks, first), (others, second) = join(engine, [4, 5]), join(engine + "b", [900, 1023])
        assert [rank.grant.word for rank in (*ranks, *others)] == [4, 5, 900, 1023]
        sequence = rig.tokens(2 * CHUNK)
        for rank in ranks:
            rank.pages.compute(sequence, range(8))
        first.store(ranks, sequence, range(8))
        hit, failed = second.load(others, sequence, range(8, 16))
        assert (hit.tokens, failed) == (2 * CHUNK, [])
        for rank in others:
            assert rank.pages.wrong(sequence, range(8, 16), hit.tokens) == []
        rig.assert_idle(shared[0])

    def test_what_one_has_in_the_air_does_not_land_with_the_other(self, engine, join, shared):
        (_, first), (others, second) = join(engine, [0, 1]), join(engine + "b", [2, 3])
        first.plan_store(rig.tokens(CHUNK), range(4))
        second.store(others, rig.tokens(CHUNK, 1), range(4))
        first.cache.flights.settle()
        assert (len(first.cache.flights), len(second.cache.flights)) == (1, 0)
        assert len(shared[0]) == 1
        first.cache.flights.ground()
        rig.assert_idle(shared[0])

    def test_what_one_stored_outlives_it(self, engine, join):
        ranks, first = join(engine, [0, 1])
        sequence = rig.tokens(CHUNK)
        for rank in ranks:
            rank.pages.compute(sequence, range(4))
        first.store(ranks, sequence, range(4))
        first.cache.close()
        others, second = join(engine + "b", [2, 3])
        hit, failed = second.load(others, sequence, range(4))
        assert (hit.tokens, failed) == (CHUNK, [])

    def test_an_engine_that_cannot_attach_leaves_the_decider_alone(self, engine, join, shared):
        ranks, first = join(engine, [0, 1])
        with pytest.raises(HandoverError):
            Attachment.open("nobody", 1, CHUNK, lambda g: shared, 0.1, words=[2])
        first.store(ranks, rig.tokens(CHUNK), range(4))
        assert len(shared[0]) == 1


class TestTwins:
    """MLA: every rank holds the same bytes, and they are stored once."""

    @pytest.fixture
    def ranks(self, workshop, engine):
        return [rig.Rank(workshop, engine, n, slice_index=0, pages=rig.Pages(16)) for n in range(4)]

    def test_one_of_them_writes(self, ranks, attach):
        attachment = attach(4)
        assert [rank.grant.writes for rank in ranks] == [True, False, False, False]
        assert attachment.geometry.slices == (rig.PAGE_BYTES,)

    def test_all_of_them_load(self, ranks, attach):
        engine = Engine(attach(4))
        sequence = rig.tokens(CHUNK)
        ranks[0].pages.compute(sequence, range(4))  # the others hold nothing at all
        engine.store(ranks, sequence, range(4))
        for rank in ranks:
            rank.pages.poison()
        hit, failed = engine.load(ranks, sequence, range(8, 12))
        assert (hit.tokens, failed) == (CHUNK, [])
        for rank in ranks:
            assert rank.pages.wrong(sequence, range(8, 12), CHUNK) == []

    def test_the_slowest_of_them_counts_too(self, ranks, attach):
        """A twin that still loads must not lose its slot."""
        engine = Engine(attach(4))
        engine.store(ranks, rig.tokens(CHUNK), range(4))
        number, _, hit = engine.plan_load(rig.tokens(CHUNK), range(4))
        for rank in ranks[:3]:
            rank.mover.finish(number)
        engine.cache.flights.settle()
        assert hit.lease in engine.cache.decider.leases
        ranks[3].mover.finish(number)
        engine.cache.flights.settle()
        assert hit.lease not in engine.cache.decider.leases

    def test_two_slices_with_a_twin_each(self, workshop, attach, engine):
        ranks = [
            rig.Rank(workshop, engine, n, slice_index=n % 2, pages=rig.Pages(16, slice_index=n % 2))
            for n in (0, 1, 2, 3)
        ]
        run = Engine(attach(4))
        assert [rank.grant.writes for rank in ranks] == [True, True, False, False]
        sequence = rig.tokens(CHUNK)
        for rank in ranks:
            rank.pages.compute(sequence, range(4))
        run.store(ranks, sequence, range(4))
        for rank in ranks:
            rank.pages.poison()
        run.load(ranks, sequence, range(4))
        assert [rank.pages.wrong(sequence, range(4), CHUNK) for rank in ranks] == [[]] * 4


def slabs_open():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sum("memfd:lmcache" in link for link in links)


class TestRefusals:
    """An attempt that fails keeps nothing, so that it may be made again for ever."""

    def test_a_mover_is_missing(self, workshop, engine, attach, made):
        rig.Rank(workshop, engine, 0)
        with pytest.raises(HandoverError, match="no mover answers"):
            attach(2)
        assert made == []
        rig.Rank(workshop, engine, 1)
        assert attach(2).is_whole()

    def test_movers_disagree(self, workshop, engine, attach, made):
        rig.Rank(workshop, engine, 0)
        rig.Rank(workshop, engine, 1, slice_index=0, pages=rig.Pages(8, kind="other"))
        with pytest.raises(HandoverError, match="movers 0 and 1 hold one slice in two layouts"):
            attach(2)
        assert made == []

    def test_a_mover_with_anothers_number(self, workshop, engine, attach):
        rig.Rank(workshop, engine, 0, pid=1)
        door = Door(
            address_of(engine, 1),
            rig.hello(0, slice_index=1),
            lambda grant, fds: None,
            lambda: None,
        )
        workshop.later(door.close)
        with pytest.raises(HandoverError, match=r"movers say they are \[0, 0\]"):
            attach(2)

    def test_a_mover_that_cannot_map_the_slab(self, workshop, engine, attach, made):
        ranks = [rig.Rank(workshop, engine, number) for number in range(2)]

        def fail(grant, fds):
            os.close(fds[0])
            raise MemoryError

        ranks[1].door._granted = fail
        before = slabs_open()
        for _ in range(3):
            with pytest.raises(HandoverError, match="could not map the slab"):
                attach(2)
        ranks[0].close()
        assert slabs_open() == before, "each attempt left a slab"
        assert [decider.slab.fd for decider, _ in made] == [-1] * 3

    @pytest.mark.parametrize("error", [BackendError, ConfigError, OSError, KeyError])
    def test_nothing_can_be_built(self, workshop, engine, error):
        rig.Rank(workshop, engine, 0)

        def fail(geometry):
            raise error("on purpose")

        for _ in range(3):
            with pytest.raises(error, match="on purpose"):
                Attachment.open(engine, 1, CHUNK, fail, 2.0)


class TestDetaching:
    def test_everything_is_let_go(self, workshop, engine, attach):
        rig.Rank(workshop, engine, 0)
        attachment, called = attach(1), []
        attachment.on_close += [lambda: called.append(1), lambda: called.append(2)]
        attachment.close()
        assert called == [1, 2]
        rig.wait_until(lambda: not attachment.is_whole())
        assert attach(1).is_whole(), "the mover waits for the next"

    def test_an_error_on_the_way_keeps_nothing_else(self, workshop, engine, attach):
        rig.Rank(workshop, engine, 0)
        attachment, called = attach(1), []

        def fail():
            raise RuntimeError("on purpose")

        attachment.on_close += [fail, lambda: called.append(1)]
        with pytest.raises(RuntimeError, match="on purpose"):
            attachment.close()
        assert called == [1]
        assert not attachment.is_whole()
        attachment.on_close.clear()

    def test_the_slab_goes_with_the_attachment(self, workshop, engine, build):
        """Nobody closes it: the scheduler's thread may still look at it."""
        rank = rig.Rank(workshop, engine, 0)
        before = slabs_open()
        attachment = Attachment.open(engine, 1, CHUNK, lambda g: pair(rig.decider(8)), 2.0)
        attachment.close()
        rank.close()
        fd = attachment.decider.slab.fd
        attachment.decider.gauges()
        attachment.flights.settle()
        os.fstat(fd)
        del attachment
        assert slabs_open() <= before, "only the cycle collector would have found it"


def pair(decider):
    return decider, Tiers(decider, [])


class Quick(Joining):
    FIRST_WAIT_S = 0.5
    PAUSES_S = (0.01, 0.02)
    WATCH_S = 0.01
    LOSS_S = 0.01


class TestJoining:
    @pytest.fixture
    def join(self, workshop, engine):
        def join(movers=1, attach=None):
            def open_it():
                return Attachment.open(engine, movers, CHUNK, lambda g: pair(rig.decider(8)), 2.0)

            made = Quick(attach or open_it)
            workshop.later(made.close)
            return made

        return join

    def test_at_once_if_the_movers_are_there(self, workshop, engine, join):
        rig.Rank(workshop, engine, 0)
        assert join().current().is_whole()

    def test_the_engine_is_not_kept_waiting_for_a_mover(self, join):
        began = time.monotonic()
        joining = join()
        assert time.monotonic() - began < 2
        assert joining.current() is None

    @pytest.mark.parametrize("error", [ConfigError, PluginError])
    def test_a_mistake_that_trying_again_would_not_mend(self, join, error):
        threads = set(threading.enumerate())

        def attach():
            raise error("no policy 'LRV'")

        with pytest.raises(error, match="LRV"):
            join(attach=attach)
        assert set(threading.enumerate()) == threads

    def test_the_same_mistake_later_does_not_end_the_engine(self, workshop, engine, join):
        joining = join()
        attach = joining._attach

        def fail_once():
            joining._attach = attach
            raise ConfigError("cannot keep objects in '/full'")

        joining._attach = fail_once
        rig.Rank(workshop, engine, 0)
        rig.wait_until(joining.current)
        assert joining.current().is_whole()

    def test_a_mover_that_comes_later(self, workshop, engine, join):
        joining = join()
        rig.Rank(workshop, engine, 0)
        rig.wait_until(joining.current)
        assert joining.current().is_whole()

    def test_the_second_mover_comes_later(self, workshop, engine, join):
        rig.Rank(workshop, engine, 0)
        joining = join(2)
        time.sleep(0.1)
        assert joining.current() is None
        rig.Rank(workshop, engine, 1)
        rig.wait_until(joining.current)

    def test_a_mover_dies_and_comes_back(self, workshop, engine, join):
        joining = None
        for _ in range(3):
            rank = rig.Rank(workshop, engine, 0)
            joining = joining or join()
            rig.wait_until(joining.current)
            first = joining.current()
            rank.close()
            rig.wait_until(lambda joining=joining: joining.current() is None)
            assert not first.is_whole()

    def test_one_of_two_dies_and_both_are_joined_anew(self, workshop, engine, join):
        stays, goes = (rig.Rank(workshop, engine, number) for number in range(2))
        joining = join(2)
        first = joining.current()
        goes.close()
        rig.wait_until(lambda: joining.current() is not first)
        back = rig.Rank(workshop, engine, 1)
        rig.wait_until(joining.current)
        run = Engine(joining.current())
        sequence = rig.tokens(CHUNK)
        for rank in (stays, back):
            rank.pages.compute(sequence, range(4))
        run.store([stays, back], sequence, range(4))
        for rank in (stays, back):
            rank.pages.poison()
        hit, failed = run.load([stays, back], sequence, range(4))
        assert (hit.tokens, failed) == (CHUNK, [])
        assert stays.pages.wrong(sequence, range(4), CHUNK) == []

    @pytest.mark.parametrize("error", [OSError, ValueError, KeyError, ImportError, BackendError])
    def test_any_error_is_tried_again(self, workshop, engine, join, error):
        """Out of descriptors, a plugin's own mistake: the thread that tries must not die of it."""
        rig.Rank(workshop, engine, 0)
        attempts = []

        def attach():
            attempts.append(1)
            if len(attempts) < 4:
                raise error("on purpose")
            return Attachment.open(engine, 1, CHUNK, lambda g: pair(rig.decider(8)), 2.0)

        joining = join(attach=attach)
        rig.wait_until(joining.current)
        assert len(attempts) == 4

    def test_an_error_while_detaching_does_not_keep_it_from_coming_back(
        self, workshop, engine, join
    ):
        rank = rig.Rank(workshop, engine, 0)
        joining = join()

        def fail():
            raise KeyError("on purpose")

        joining.current().on_close.append(fail)
        rank.close()
        rig.wait_until(lambda joining=joining: joining.current() is None)
        rig.Rank(workshop, engine, 0)
        rig.wait_until(joining.current)

    def test_a_failure_is_said_once(self, join, capfd):
        joining = join()
        time.sleep(0.2)
        joining.close()
        assert capfd.readouterr().err.count("serving without a cache for now") <= 1

    def test_closing_lets_go(self, workshop, engine, join):
        rig.Rank(workshop, engine, 0)
        joining = join()
        attachment = joining.current()
        joining.close()
        assert joining.current() is None
        assert not attachment.is_whole()
        joining.close()

    def test_closing_while_it_tries(self, join):
        joining = join()
        joining.close()
        assert not [t for t in threading.enumerate() if t.name == "lmcache-joining"]

    def test_what_is_attached_while_it_closes_is_let_go(self, workshop, engine, join):
        rig.Rank(workshop, engine, 0)
        go, opened = threading.Event(), []

        def attach():
            go.wait(5)
            opened.append(Attachment.open(engine, 1, CHUNK, lambda g: pair(rig.decider(8)), 2.0))
            return opened[0]

        joining = join(attach=attach)
        threading.Timer(0.1, go.set).start()
        joining.close()
        assert joining.current() is None
        assert not opened[0].is_whole()

    def test_a_lost_attachment_is_kept_by_nobody(self, workshop, engine, join):
        """While a mover is away, which may be for long, its slab must not take up memory."""
        rank = rig.Rank(workshop, engine, 0)
        before = slabs_open()
        joining = join()
        assert slabs_open() >= before
        rank.close()
        rig.wait_until(lambda joining=joining: joining.current() is None)
        rig.wait_until(lambda: slabs_open() <= before - 1 or slabs_open() == 0)

    def test_the_scheduler_works_on_while_movers_come_and_go(self, workshop, engine, join):
        """It never waits for the thread that joins, so it may hold what that thread lets go of."""

        def attach():
            def build(geometry):
                decider = rig.decider(8)
                return decider, Tiers(decider, [Tier("t0", MemoryBackend())])

            return Attachment.open(engine, 1, CHUNK, build, 2.0)

        stop, turns, failures = threading.Event(), [], []
        joining = join(attach=attach)

        def schedule():
            turn = 0
            try:
                while not stop.is_set():
                    cache = joining.current()
                    if cache is None:
                        continue
                    run, turn = Engine(cache), turn + 1
                    run.plan_store(rig.tokens(CHUNK, turn % 20), range(4))
                    cache.tiers.lookup(
                        f"r{turn}", run.chain(rig.tokens(CHUNK, turn % 20)), cache.geometry, CHUNK
                    )
                    cache.flights.settle()
                    cache.flights.ground()
                    turns.append(turn)
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=schedule)
        thread.start()
        for _ in range(20):
            rank = rig.Rank(workshop, engine, 0)
            rig.wait_until(joining.current)
            time.sleep(0.01)
            rank.close()
            rig.wait_until(lambda: joining.current() is None)
        stop.set()
        thread.join()
        assert failures == []
        assert len(turns) > 20

    def test_a_hundred_losses_leave_nothing(self, workshop, engine, join):
        joining = None
        fds, threads = None, None
        for turn in range(100):
            rank = rig.Rank(workshop, engine, 0)
            joining = joining or join()
            rig.wait_until(joining.current)
            rank.close()
            rig.wait_until(lambda joining=joining: joining.current() is None)
            if turn == 10:
                rig.wait_until(lambda: slabs_open() == 0)
                fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        rig.wait_until(lambda: slabs_open() == 0)
        assert len(os.listdir("/proc/self/fd")) <= fds + 2
        assert threading.active_count() <= threads + 2


class TestTwoProcesses:
    """Two ranks in two processes, the scheduler in this one."""

    @pytest.fixture
    def movers(self, workshop, engine):
        made = [workshop.process("mover", engine, number, number) for number in range(2)]
        return [each.ready() for each in made]

    def both(self, movers, name, **details):
        return [each.do(name, **details) for each in movers]

    def test_a_round_trip(self, movers, attach):
        run = Engine(attach(2))
        sequence, table = rig.tokens(2 * CHUNK), list(range(8))
        self.both(movers, "compute", tokens=sequence, table=table)
        number, moves, _ = run.plan_store(sequence, table)
        self.both(movers, "store", moves=moves, step=number)
        run.cache.flights.settle()
        self.both(movers, "poison")
        table = list(range(20, 28))
        number, moves, hit = run.plan_load(sequence, table)
        assert self.both(movers, "load", moves=moves, step=number) == [[], []]
        run.cache.flights.settle()
        wrong = self.both(movers, "wrong", tokens=sequence, table=table, stop=hit.tokens)
        assert (hit.tokens, wrong) == (2 * CHUNK, [[], []])
        rig.assert_idle(run.cache.decider)

    def test_a_rank_killed_in_the_middle_of_a_step(self, workshop, engine, movers, made, build):
        joining = Quick(lambda: Attachment.open(engine, 2, CHUNK, build, 2.0))
        workshop.later(joining.close)
        rig.wait_until(joining.current)
        first = joining.current()
        run = Engine(first)
        sequence = rig.tokens(CHUNK)
        self.both(movers, "compute", tokens=sequence, table=[0, 1, 2, 3])
        number, moves, _ = run.plan_store(sequence, [0, 1, 2, 3])
        movers[0].do("store", moves=moves, step=number)
        movers[1].kill()
        rig.wait_until(lambda joining=joining: joining.current() is None)
        first.flights.settle()
        assert len(first.decider) == 0, "half of the object was never written"
        first.flights.ground()
        rig.assert_idle(first.decider)
        again = workshop.process("mover", engine, 1, 1).ready()
        rig.wait_until(joining.current)
        assert movers[0].do("grants") == 2
        assert again.do("grants") == 1
        second = joining.current()
        assert second.decider is not first.decider
        for decider, _ in made:
            workshop.later(decider.slab.close)


def test_geometry_is_a_value():
    assert rig.geometry() == rig.geometry()
    assert replace(rig.geometry(), page_tokens=8).chunk_tokens == 8 * rig.PAGES_PER_CHUNK
