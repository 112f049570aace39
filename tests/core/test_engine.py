"""The whole cache in one process: what comes back is what was stored, or it does not come back."""

from __future__ import annotations

import gc
import random

import pytest
import rig

from lmcache.backends.memory import MemoryBackend
from lmcache.core.engine import moves_for
from lmcache.core.index import Slot
from lmcache.core.keys import Identity, Insert
from lmcache.core.receipts import Reason
from lmcache.testing.faults import Corrupting, Flaky, Wrapper

PAGE, CHUNK = rig.PAGE_TOKENS, rig.CHUNK_TOKENS
LENGTHS = [
    0,
    1,
    PAGE - 1,
    PAGE,
    PAGE + 1,
    CHUNK - PAGE,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    CHUNK + PAGE - 1,
    CHUNK + PAGE,
    2 * CHUNK - 1,
    2 * CHUNK,
    2 * CHUNK + PAGE + 1,
]


class Kept(Wrapper):
    """A backend that outlives its cache."""

    def close(self):
        pass


def drain(steps):
    """Run a generator to its end: what it yielded, and what it returned."""
    yielded = []
    while True:
        try:
            yielded.append(next(steps))
        except StopIteration as end:
            return yielded, end.value


def compute(engine, sequence, table, *, salt=""):
    engine.pages.compute(sequence, table, salt=salt)


def store(engine, sequence, table, *, by_layer=False, salt="", **options):
    compute(engine, sequence, table, salt=salt)
    chain = engine.chain(sequence, Identity(salt=salt))
    if by_layer:
        layers, receipt = drain(engine.store_layers(chain, table, **options))
        assert layers == list(range(rig.REGIONS))
        return receipt
    return engine.store(chain, table, **options)


def retrieve(engine, sequence, table, *, by_layer=False, salt="", start=0):
    """Load into poisoned pages and check every byte: the hit, and the receipt of the load."""
    engine.pages.poison()
    hit = engine.lookup(engine.chain(sequence, Identity(salt=salt)))
    if by_layer:
        layers, receipt = drain(engine.retrieve_layers(hit, table, start))
        assert layers == list(range(rig.REGIONS))
    else:
        receipt = engine.retrieve(hit, table, start)
    first = start // PAGE
    stop = first * PAGE + receipt.tokens
    assert engine.pages.wrong(sequence, table, stop, salt=salt, first=first) == []
    loaded = [table[i] for i in range(first, hit.tokens // PAGE)]
    assert engine.pages.untouched(except_for=loaded)
    assert sum(receipt.by_tier.values()) == receipt.tokens
    assert sum(hit.receipt.by_tier.values()) == hit.tokens
    return hit, receipt


def shuffled(count, seed=0, of=32):
    return random.Random(seed).sample(range(of), count)


class TestRoundTrips:
    @pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "layers"])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_whole_pages_come_back(self, workshop, length, by_layer):
        engine = workshop.engine()
        sequence, pages = rig.tokens(length), length // PAGE
        stored = store(engine, sequence, shuffled(pages), by_layer=by_layer)
        assert (stored.tokens, stored.reason) == (pages * PAGE, Reason.NONE)
        assert stored.bytes == pages * rig.PAGE_BYTES
        assert stored.by_tier == {"l1": pages * PAGE}
        hit, loaded = retrieve(engine, sequence, shuffled(pages, 1), by_layer=by_layer)
        assert hit.tokens == loaded.tokens == loaded.asked == pages * PAGE
        assert hit.receipt.reason is (Reason.NONE if pages else Reason.SHORT)
        assert loaded.bytes == hit.receipt.bytes == pages * rig.PAGE_BYTES
        assert loaded.reason is Reason.NONE
        rig.assert_idle(engine.decider)

    @pytest.mark.parametrize("asked", LENGTHS)
    @pytest.mark.parametrize("length", [PAGE, CHUNK - 1, CHUNK, CHUNK + PAGE + 1])
    def test_a_shorter_or_longer_prompt_hits_what_it_shares(self, workshop, length, asked):
        """Full chunks for any prompt; a tail for prompts that end no earlier."""
        engine = workshop.engine()
        sequence = rig.tokens(max(LENGTHS))
        store(engine, sequence[:length], shuffled(length // PAGE))
        hit, _ = retrieve(engine, sequence[:asked], shuffled(asked // PAGE, 1))
        whole = length // CHUNK * CHUNK
        tail = length // PAGE * PAGE
        expected = tail if asked >= tail else min(whole, asked // CHUNK * CHUNK)
        assert hit.tokens == expected
        rig.assert_idle(engine.decider)

    def test_without_tails_only_full_chunks_are_stored(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(2 * CHUNK - 1)
        assert store(engine, sequence, shuffled(7), tail=False).tokens == CHUNK
        assert retrieve(engine, sequence, shuffled(7, 1))[0].tokens == CHUNK

    @pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "layers"])
    @pytest.mark.parametrize("start", [0, PAGE, CHUNK - PAGE, CHUNK, CHUNK + PAGE, 2 * CHUNK])
    def test_from_a_start_on(self, workshop, start, by_layer):
        """The engine's own prefix cache has what comes before."""
        engine = workshop.engine()
        sequence = rig.tokens(2 * CHUNK + PAGE)
        store(engine, sequence, shuffled(9))
        hit, loaded = retrieve(engine, sequence, shuffled(9, 1), start=start, by_layer=by_layer)
        assert hit.tokens == len(sequence)
        assert loaded.tokens == loaded.asked == len(sequence) - start
        rest = shuffled(9, 1)[: start // PAGE]
        assert all(set(engine.pages.read(page)) == {rig.POISON} for page in rest)

    def test_a_start_inside_a_page_is_rounded_down(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(CHUNK)
        store(engine, sequence, shuffled(4))
        assert retrieve(engine, sequence, shuffled(4, 1), start=PAGE + 1)[1].tokens == CHUNK - PAGE

    def test_into_fewer_pages_than_hit(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(2 * CHUNK)
        store(engine, sequence, shuffled(8))
        engine.pages.poison()
        receipt = engine.retrieve(engine.lookup(engine.chain(sequence)), [3, 1, 2, 9, 5])
        assert receipt.tokens == 5 * PAGE
        assert engine.pages.wrong(sequence, [3, 1, 2, 9, 5], 5 * PAGE) == []

    def test_nothing_is_stored_twice(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(2 * CHUNK)
        store(engine, sequence, shuffled(8))
        again = store(engine, sequence, shuffled(8, 1))
        assert (again.tokens, again.bytes, again.reason) == (0, 0, Reason.NONE)

    def test_a_sequence_grows(self, workshop):
        """As in a conversation: each turn stores what it adds, and tails give way to chunks."""
        engine = workshop.engine(slots=32)
        sequence, table = rig.tokens(6 * CHUNK), shuffled(24)
        stored = 0
        for length in range(PAGE, 6 * CHUNK + 1, 3 * PAGE - 1):
            done = stored // PAGE * PAGE
            store(engine, sequence[:length], table, start=done)
            hit, _ = retrieve(engine, sequence[:length], table)
            assert hit.tokens == length // PAGE * PAGE
            stored = length

    def test_a_tail_is_superseded(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(2 * CHUNK)
        for pages in (1, 3, 4, 6):
            store(engine, sequence[: pages * PAGE], shuffled(pages))
            hit, _ = retrieve(engine, sequence[: 8 * PAGE - 1], shuffled(8, 1))
            assert hit.tokens == pages * PAGE, "the longest of what is there"

    def test_a_tail_of_another_sequence_is_no_hit(self, workshop):
        engine = workshop.engine()
        sequence, other = rig.tokens(CHUNK + 2 * PAGE), rig.tokens(CHUNK + 2 * PAGE)
        other[CHUNK + PAGE] += 1
        store(engine, sequence, shuffled(6))
        assert retrieve(engine, other, shuffled(6, 1))[0].tokens == CHUNK


class TestWhatTellsThemApart:
    def test_salts_do_not_share(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(CHUNK)
        store(engine, sequence, shuffled(4), salt="a")
        hit, _ = retrieve(engine, sequence, shuffled(4, 1), salt="b")
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.NEVER_STORED)
        assert retrieve(engine, sequence, shuffled(4, 1), salt="a")[0].tokens == CHUNK

    def test_images_do_not_share(self, workshop):
        engine = workshop.engine()
        sequence = [7] * CHUNK
        compute(engine, sequence, shuffled(4))
        engine.store(engine.chain(sequence, inserts=[Insert("cat", 0, 8)]), shuffled(4))
        assert engine.lookup(engine.chain(sequence, inserts=[Insert("dog", 0, 8)])).tokens == 0
        assert engine.lookup(engine.chain(sequence)).tokens == 0

    def test_two_engines_in_one_process_share_nothing(self, workshop):
        one, other = workshop.engine(), workshop.engine()
        store(one, rig.tokens(CHUNK), shuffled(4))
        assert retrieve(other, rig.tokens(CHUNK), shuffled(4))[0].tokens == 0
        one.close()
        store(other, rig.tokens(CHUNK), shuffled(4))
        assert retrieve(other, rig.tokens(CHUNK), shuffled(4, 1))[0].tokens == CHUNK

    def test_two_engines_share_a_tier_if_their_layouts_are_equal(self, workshop):
        backend = Kept(MemoryBackend())
        one = workshop.engine(8, backend)
        same = workshop.engine(8, backend, pages=rig.Pages(11))
        other = workshop.engine(8, backend, pages=rig.Pages(16, kind="other"))
        store(one, rig.tokens(CHUNK), shuffled(4))
        one.tiers.flush()
        hit, _ = retrieve(same, rig.tokens(CHUNK), shuffled(4, 1, of=11))
        assert hit.receipt.by_tier == {"l1": 0, "t0": CHUNK}
        assert retrieve(other, rig.tokens(CHUNK), shuffled(4, 1, of=16))[0].tokens == 0

    def test_layouts_that_differ_do_not_share_a_tier(self, workshop):
        backend = Kept(MemoryBackend())
        store(workshop.engine(8, backend), rig.tokens(CHUNK), shuffled(4))
        wide = workshop.engine(8, backend, pages=rig.Pages(16, width=2 * rig.WIDTH))
        assert wide.lookup(wide.chain(rig.tokens(CHUNK))).tokens == 0


class TestReceipts:
    def test_they_add_up_over_tiers(self, workshop):
        backend = Kept(MemoryBackend())
        store(workshop.engine(8, backend), rig.tokens(3 * CHUNK), shuffled(12))
        engine = workshop.engine(8, backend)
        store(engine, rig.tokens(CHUNK), shuffled(4))
        hit, loaded = retrieve(engine, rig.tokens(3 * CHUNK), shuffled(12, 1))
        assert hit.receipt.by_tier == loaded.by_tier == {"l1": CHUNK, "t0": 2 * CHUNK}

    @pytest.mark.parametrize(
        ("start", "by_tier"),
        [
            (PAGE, {"l1": CHUNK - PAGE, "t0": CHUNK}),
            (CHUNK, {"l1": 0, "t0": CHUNK}),
            (CHUNK + PAGE, {"l1": 0, "t0": CHUNK - PAGE}),
        ],
    )
    def test_they_tell_what_was_loaded_not_what_was_found(self, workshop, start, by_tier):
        backend = Kept(MemoryBackend())
        store(workshop.engine(8, backend), rig.tokens(2 * CHUNK), shuffled(8))
        engine = workshop.engine(8, backend)
        store(engine, rig.tokens(CHUNK), shuffled(4))
        _, loaded = retrieve(engine, rig.tokens(2 * CHUNK), shuffled(8, 1), start=start)
        assert loaded.by_tier == by_tier

    def test_they_are_what_was_counted(self, workshop):
        engine = workshop.engine(4)
        receipts = []
        for turn in range(12):
            sequence = rig.tokens(2 * CHUNK + PAGE, turn % 4)
            receipts.append(store(engine, sequence, shuffled(9)))
            retrieve(engine, sequence, shuffled(9, 1))
        counters = engine.decider.counters
        assert counters["stored_tokens"] == sum(receipt.tokens for receipt in receipts)
        assert counters["stored_bytes"] == sum(receipt.bytes for receipt in receipts)
        assert counters["lookups"] == 12
        assert counters["lookup_tokens"] == 12 * (2 * CHUNK + PAGE)
        assert counters["load_failures"] == counters["store_failures"] == 0

    def test_no_room_is_said(self, workshop):
        engine = workshop.engine(2)
        store(engine, rig.tokens(2 * CHUNK), shuffled(8))
        hit = engine.lookup(engine.chain(rig.tokens(2 * CHUNK)))
        receipt = store(engine, rig.tokens(CHUNK, 1), shuffled(4))
        assert (receipt.tokens, receipt.asked, receipt.reason) == (0, CHUNK, Reason.NO_ROOM)
        engine.release(hit)
        assert store(engine, rig.tokens(CHUNK, 1), shuffled(4)).tokens == CHUNK

    def test_as_much_as_fits_is_stored(self, workshop):
        engine = workshop.engine(2)
        receipt = store(engine, rig.tokens(4 * CHUNK), shuffled(16))
        assert (receipt.tokens, receipt.reason) == (2 * CHUNK, Reason.NO_ROOM)
        assert retrieve(engine, rig.tokens(4 * CHUNK), shuffled(16, 1))[0].tokens == 2 * CHUNK


class TestMistakes:
    def test_a_page_table_too_short_stores_what_it_covers(self, workshop):
        """And never a chunk of which a part was not there to be copied."""
        engine = workshop.engine()
        sequence = rig.tokens(2 * CHUNK)
        compute(engine, sequence, shuffled(8))
        receipt = engine.store(engine.chain(sequence), shuffled(8)[:6])
        assert (receipt.tokens, receipt.asked) == (6 * PAGE, 6 * PAGE)
        assert retrieve(engine, sequence, shuffled(8, 1))[0].tokens == 6 * PAGE

    @pytest.mark.parametrize("bad", [[0, 1, 99, 2], [0, 1, None, 2], [0, 1, "x", 2], [0, 1, -1, 2]])
    @pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "layers"])
    def test_a_page_that_is_none_leaks_nothing(self, workshop, bad, by_layer):
        engine = workshop.engine()
        chain = engine.chain(rig.tokens(CHUNK))
        with pytest.raises((IndexError, TypeError, ValueError)):
            drain(engine.store_layers(chain, bad)) if by_layer else engine.store(chain, bad)
        rig.assert_idle(engine.decider)
        store(engine, rig.tokens(CHUNK), shuffled(4))
        hit = engine.lookup(chain)
        with pytest.raises((IndexError, TypeError, ValueError)):
            drain(engine.retrieve_layers(hit, bad)) if by_layer else engine.retrieve(hit, bad)
        rig.assert_idle(engine.decider)

    def test_tokens_without_a_key_leak_nothing(self, workshop):
        engine = workshop.engine(8, MemoryBackend())
        sequence = [*rig.tokens(2 * CHUNK), *[-1] * CHUNK]
        engine.store(engine.chain(rig.tokens(CHUNK)), shuffled(4))
        engine.tiers.flush()
        for call in (lambda c: engine.store(c, shuffled(12)), engine.lookup):
            with pytest.raises((OverflowError, TypeError)):
                call(engine.chain(sequence))
        rig.assert_idle(engine.decider)

    def test_a_hit_that_ran_out_is_loaded_or_refused_but_never_wrong(self, workshop):
        clock = rig.Clock()
        engine = workshop.engine(2, clock=clock, lease_s=10.0)
        sequence = rig.tokens(2 * CHUNK)
        store(engine, sequence, shuffled(8))
        for others, tokens in ((0, 2 * CHUNK), (1, CHUNK)):
            hit = engine.lookup(engine.chain(sequence))
            clock.now += 20
            for seed in range(others):
                store(engine, rig.tokens(CHUNK, 1 + seed), shuffled(4))
            engine.pages.poison()
            receipt = engine.retrieve(hit, shuffled(8))
            assert receipt.tokens == tokens
            assert receipt.reason is (Reason.LOAD_FAILED if others else Reason.NONE)
            assert receipt.by_tier == {"l1": tokens}
            assert engine.pages.wrong(sequence, shuffled(8), tokens) == []
            assert len(engine.decider.leases) == 0

    def test_a_hit_may_be_retrieved_again(self, workshop):
        engine = workshop.engine()
        store(engine, rig.tokens(CHUNK), shuffled(4))
        hit = engine.lookup(engine.chain(rig.tokens(CHUNK)))
        assert [engine.retrieve(hit, shuffled(4, 1)).tokens for _ in range(2)] == [CHUNK] * 2
        rig.assert_idle(engine.decider)

    def test_a_slot_that_lost_its_word_is_a_failed_load_and_gone(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(3 * CHUNK)
        store(engine, sequence, shuffled(12))
        hit = engine.lookup(engine.chain(sequence))
        where = hit.slots[1].offset + engine.geometry.tag_offset(0)
        engine.decider.slab.write_word(where, 1)
        engine.pages.poison()
        receipt = engine.retrieve(hit, shuffled(12, 1))
        assert (receipt.tokens, receipt.asked) == (CHUNK, 3 * CHUNK)
        assert receipt.reason is Reason.LOAD_FAILED
        assert sum(receipt.by_tier.values()) == CHUNK
        assert engine.decider.counters["load_failures"] == 1
        assert retrieve(engine, sequence, shuffled(12, 1))[0].tokens == CHUNK

    def test_nothing_hits_nothing(self, workshop):
        engine = workshop.engine()
        hit = engine.lookup(engine.chain(rig.tokens(CHUNK)))
        receipt = engine.retrieve(hit, shuffled(4))
        assert (receipt.tokens, receipt.asked, receipt.bytes) == (0, 0, 0)
        engine.release(hit)


class TestLayers:
    def test_a_layer_is_stored_when_it_is_asked_for_and_not_before(self, workshop):
        """Each `next` copies the layer that has been computed since the last."""
        engine = workshop.engine()
        sequence, table = rig.tokens(CHUNK), shuffled(4)
        engine.pages.compute(sequence, table)
        truth = engine.pages.memory.copy()
        engine.pages.poison()
        steps = engine.store_layers(engine.chain(sequence), table)
        for layer in steps:
            engine.pages.memory[layer] = truth[layer]
        assert retrieve(engine, sequence, shuffled(4, 1))[0].tokens == CHUNK

    @pytest.mark.parametrize("done", [0, 1, rig.REGIONS])
    def test_a_store_that_is_given_up_stores_nothing(self, workshop, done):
        engine = workshop.engine()
        sequence = rig.tokens(CHUNK)
        compute(engine, sequence, shuffled(4))
        steps = engine.store_layers(engine.chain(sequence), shuffled(4))
        for _ in range(done):
            next(steps)
        steps.close()
        hit = engine.lookup(engine.chain(sequence))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.NEVER_STORED)
        rig.assert_idle(engine.decider)

    @pytest.mark.parametrize("done", [1, rig.REGIONS])
    def test_a_load_that_is_given_up_ends_its_lease(self, workshop, done):
        engine = workshop.engine()
        store(engine, rig.tokens(CHUNK), shuffled(4))
        steps = engine.retrieve_layers(engine.lookup(engine.chain(rig.tokens(CHUNK))), shuffled(4))
        for _ in range(done):
            next(steps)
        assert len(engine.decider.leases) == 1
        del steps
        gc.collect()
        assert len(engine.decider.leases) == 0

    def test_a_chunk_is_not_seen_before_its_last_layer(self, workshop):
        engine = workshop.engine()
        sequence = rig.tokens(CHUNK)
        steps = engine.store_layers(engine.chain(sequence), shuffled(4))
        for _ in steps:
            hit = engine.lookup(engine.chain(sequence))
            assert (hit.tokens, hit.receipt.reason) == (0, Reason.BEING_WRITTEN)
        assert engine.lookup(engine.chain(sequence)).tokens == CHUNK

    @pytest.mark.parametrize("first", [0, 1])
    def test_requests_take_turns(self, workshop, first):
        """While one is stored layer by layer another comes and goes, in a slab with no room to
        spare.

        A slot that is half written must not be given to the other.
        """
        engine = workshop.engine(2)
        slow, quick = rig.tokens(CHUNK, 1), rig.tokens(CHUNK, 2)
        compute(engine, slow, range(4))
        steps = engine.store_layers(engine.chain(slow), range(4))
        next(steps)
        for seed in (2, 3, 4):
            quick = rig.tokens(CHUNK, seed)
            engine.pages.compute(quick, range(8, 12))
            assert engine.store(engine.chain(quick), range(8, 12)).tokens == CHUNK
            if first:
                receipt = engine.retrieve(engine.lookup(engine.chain(quick)), range(12, 16))
                assert receipt.tokens == CHUNK
                assert engine.pages.wrong(quick, range(12, 16), CHUNK) == []
        assert drain(steps)[1].tokens == CHUNK
        for sequence in (slow, quick):
            assert retrieve(engine, sequence, range(16, 20))[0].tokens == CHUNK
        rig.assert_idle(engine.decider)

    def test_a_layer_wise_load_keeps_its_slots_while_others_come_and_go(self, workshop):
        engine = workshop.engine(2)
        slow = rig.tokens(CHUNK, 1)
        store(engine, slow, range(4))
        engine.pages.poison()
        steps = engine.retrieve_layers(engine.lookup(engine.chain(slow)), range(4))
        next(steps)
        for seed in (2, 3, 4, 5):
            engine.pages.compute(rig.tokens(CHUNK, seed), range(8, 12))
            engine.store(engine.chain(rig.tokens(CHUNK, seed)), range(8, 12))
        assert drain(steps)[1].tokens == CHUNK
        assert engine.pages.wrong(slow, range(4), CHUNK) == []

    def test_any_interleaving(self, workshop):
        """Layer-wise loads and stores of many requests, advanced in random order."""
        engine = workshop.engine(6, pages=rig.Pages(64))
        rng = random.Random(0)
        free = list(range(64))
        running = []
        truths = {}
        for _ in range(3000):
            if len(running) < 6 and len(free) >= 8 and rng.random() < 0.4:
                sequence = rig.tokens(rng.randint(PAGE, 2 * CHUNK), rng.randrange(5))
                table = [free.pop(rng.randrange(len(free))) for _ in range(len(sequence) // PAGE)]
                chain = engine.chain(sequence)
                if rng.random() < 0.5:
                    engine.pages.compute(sequence, table)
                    running.append((engine.store_layers(chain, table), sequence, table, False))
                else:
                    hit = engine.lookup(chain)
                    running.append((engine.retrieve_layers(hit, table), sequence, table, True))
            elif running:
                index = rng.randrange(len(running))
                steps, sequence, table, loads = running[index]
                try:
                    if rng.random() < 0.1:
                        steps.close()
                        raise StopIteration
                    next(steps)
                    continue
                except StopIteration as end:
                    receipt = end.value
                running.pop(index)
                free += table
                if receipt and loads:
                    assert engine.pages.wrong(sequence, table, receipt.tokens) == []
                    truths[receipt.reason] = truths.get(receipt.reason, 0) + 1
        for steps, *_ in running:
            steps.close()
        # a lookup whose generator never began still holds its lease
        for lease in engine.decider.leases:
            assert not lease.in_flight
            engine.decider.release(lease)
        assert truths[Reason.NONE] > 100
        assert Reason.LOAD_FAILED not in truths
        rig.assert_idle(engine.decider)


class TestOvercommitment:
    """The working set is four times the slab, and every answer is right."""

    @pytest.mark.parametrize("backends", [0, 1], ids=["l1", "l1 and l2"])
    @pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
    def test_every_answer_is_right(self, workshop, backends, keep):
        tiers = [MemoryBackend()] * backends
        engine = workshop.engine(8, *tiers, keep=keep)
        rng = random.Random(0)
        hits = 0
        for _ in range(300):
            sequence = rig.tokens(rng.randint(1, 4 * CHUNK), rng.randrange(8))
            pages = len(sequence) // PAGE
            table = shuffled(pages, rng.random())
            hit, loaded = retrieve(engine, sequence, table)
            assert loaded.tokens == hit.tokens
            hits += hit.tokens
            receipt = store(engine, sequence, table)
            assert receipt.reason is Reason.NONE or tiers, "nothing is in use"
            assert engine.decider.free_bytes >= 0
            engine.tiers.flush()
        assert (hits > 0) is bool(keep or backends)
        rig.assert_idle(engine.decider)

    @pytest.mark.parametrize("every", [2, 5])
    def test_over_a_tier_that_fails_and_corrupts(self, workshop, every):
        engine = workshop.engine(
            8, Flaky(Corrupting(MemoryBackend(), every=every), every=every + 2)
        )
        rng = random.Random(1)
        for _ in range(300):
            sequence = rig.tokens(rng.randint(1, 4 * CHUNK), rng.randrange(8))
            table = shuffled(len(sequence) // PAGE, rng.random())
            retrieve(engine, sequence, table)
            store(engine, sequence, table)
        engine.tiers.flush()
        assert engine.decider.counters["damaged"] > 0
        rig.assert_idle(engine.decider)


class TestMovesFor:
    GEOMETRY = rig.geometry()

    def slots(self, *pages):
        return [
            Slot(bytes(32), 4096 * (i + 1), self.GEOMETRY.slot_bytes(count), 100 + i, i)
            for i, count in enumerate(pages)
        ]

    @pytest.mark.parametrize(
        ("first", "stop", "expected"),
        [
            (0, 10, [(0, [10, 11, 12, 13]), (0, [14, 15, 16, 17]), (0, [18, 19])]),
            (3, 10, [(3, [13]), (0, [14, 15, 16, 17]), (0, [18, 19])]),
            (4, 9, [(0, [14, 15, 16, 17]), (0, [18])]),
            (5, 7, [(1, [15, 16])]),
            (0, 0, []),
            (10, 10, []),
            (9, 99, [(1, [19])]),
        ],
    )
    def test_a_window(self, first, stop, expected):
        slots = self.slots(4, 4, 2)
        moves = moves_for(slots, self.GEOMETRY, range(10, 20), first, stop)
        assert [(move.first, move.pages) for move in moves] == expected
        for move in moves:
            slot = next(slot for slot in slots if slot.generation == move.generation)
            assert (move.offset, move.slot_pages) == (slot.offset, self.GEOMETRY.pages_of(slot))


class TestClosing:
    def test_twice(self, workshop):
        engine = workshop.engine(8, MemoryBackend())
        store(engine, rig.tokens(CHUNK), shuffled(4))
        engine.close()
        engine.close()

    def test_a_backend_that_cannot_close_keeps_no_slab(self, workshop):
        backend = Wrapper(MemoryBackend())
        engine = workshop.engine(8, backend)

        def fail():
            raise RuntimeError("on purpose")

        backend.close, close = fail, backend.close
        with pytest.raises(RuntimeError, match="on purpose"):
            engine.close()
        assert engine.decider.slab.fd == -1
        backend.close = close

    def test_what_is_queued_is_written(self, workshop):
        backend = Kept(MemoryBackend())
        engine = workshop.engine(16, backend)
        store(engine, rig.tokens(8 * CHUNK), shuffled(32))
        engine.close()
        again = workshop.engine(8, backend)
        assert retrieve(again, rig.tokens(8 * CHUNK), shuffled(32))[0].tokens == 8 * CHUNK


@pytest.mark.parametrize("chunk_size", [1, PAGE, PAGE + 1, CHUNK, 1000])
def test_any_chunk_size(workshop, chunk_size):
    engine = workshop.engine(32, chunk_size=chunk_size)
    sequence = rig.tokens(3 * CHUNK + PAGE + 1)
    store(engine, sequence, shuffled(13))
    assert retrieve(engine, sequence, shuffled(13, 1))[0].tokens == 3 * CHUNK + PAGE
