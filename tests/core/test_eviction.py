"""The three policies keep the contract, and choose as their papers say."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import OrderedDict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.core.eviction.arc import ARCPolicy
from lmcache.core.eviction.linked import NONE, Ghosts, LinkedLists
from lmcache.core.eviction.lru import LRUPolicy
from lmcache.core.eviction.s3fifo import S3FIFOPolicy
from lmcache.testing import EvictionPolicySuite
from lmcache.testing.eviction_suite import evict, fill, key

POLICIES = [LRUPolicy, S3FIFOPolicy, ARCPolicy]
every_policy = pytest.mark.parametrize("new_policy", POLICIES, ids=lambda p: p.__name__)


class TestLRUConforms(EvictionPolicySuite):
    @pytest.fixture
    def new_policy(self):
        return LRUPolicy


class TestS3FIFOConforms(EvictionPolicySuite):
    @pytest.fixture
    def new_policy(self):
        return S3FIFOPolicy


class TestARCConforms(EvictionPolicySuite):
    @pytest.fixture
    def new_policy(self):
        return ARCPolicy


class Cache:
    """As many entries as fit, under a policy."""

    def __init__(self, policy, capacity):
        self.policy = policy
        self.capacity = capacity
        self.entries = {}
        self.numbers = {}

    def get(self, number):
        """Use `number`, stored first if it is not there; return whether it was."""
        if number in self.entries:
            self.policy.touch(self.entries[number])
            return True
        entry = len(self.entries)
        if entry == self.capacity:
            (entry,) = evict(self.policy, 1)
            del self.entries[self.numbers[entry]]
        self.entries[number] = entry
        self.numbers[entry] = number
        self.policy.add(entry, key(number))
        return False

    def hit_ratio(self, trace):
        return sum(map(self.get, trace)) / len(trace)


def zipf_trace(length=20_000, keys=1500, skew=0.8, scan_every=1000, scan=400, seed=7):
    """Few keys used often and many rarely, interrupted by scans of keys used once."""
    weights = [1 / rank**skew for rank in range(1, keys + 1)]
    trace, fresh = [], keys
    for i, number in enumerate(random.Random(seed).choices(range(keys), weights, k=length)):
        trace.append(number)
        if scan_every and i % scan_every == 0:
            trace.extend(range(fresh, fresh + scan))
            fresh += scan
    return trace


class TestLRU:
    def test_the_oldest_leaves_first(self):
        policy = LRUPolicy()
        fill(policy, [2, 0, 1])
        assert list(policy.victims()) == [2, 0, 1]

    def test_use_makes_an_entry_the_newest(self):
        policy = LRUPolicy()
        fill(policy, range(5))
        for entry in (1, 4, 0, 1):
            policy.touch(entry)
        assert list(policy.victims()) == [2, 3, 4, 0, 1]


class TestS3FIFO:
    def test_used_twice_outlives_the_unused_and_used_once(self):
        policy = S3FIFOPolicy()
        fill(policy, range(10))
        for entry in (0, 2, 4):
            policy.touch(entry)
            policy.touch(entry)
        policy.touch(1)
        assert list(policy.victims()) == [1, 3, 5, 6, 7, 8, 9, 0, 2, 4]

    def test_the_small_queue_keeps_a_tenth(self):
        policy = S3FIFOPolicy()
        fill(policy, range(19))
        for entry in 2 * list(range(19)):
            policy.touch(entry)
        assert next(policy.victims()) == 0, "all are in the main queue"
        policy.add(19, key(19))
        assert next(policy.victims()) == 0, "one in twenty is less than a tenth"
        policy.add(20, key(20))
        policy.add(21, key(21))
        assert next(policy.victims()) == 19, "three in twenty-two are more"

    def test_use_in_the_main_queue_buys_another_round(self):
        policy = S3FIFOPolicy()
        fill(policy, range(4))
        for entry in 2 * list(range(4)):
            policy.touch(entry)
        next(policy.victims())
        for entry in (0, 0, 0, 0, 0, 1, 1, 2):
            policy.touch(entry)
        assert list(policy.victims()) == [3, 2, 1, 0]

    @pytest.mark.parametrize(
        ("evicted", "order"),
        [(True, [1, 2, 9, 0]), (False, [1, 2, 0, 9])],
        ids=["evicted", "dropped"],
    )
    def test_what_returns_after_eviction_goes_to_the_main_queue(self, evicted, order):
        policy = S3FIFOPolicy()
        fill(policy, range(3))
        policy.remove(0, evicted=evicted)
        policy.add(0, key(0))
        policy.add(9, key(9))
        assert list(policy.victims()) == order

    def test_it_remembers_as_many_evicted_as_there_are_residents(self):
        cache = Cache(S3FIFOPolicy(), 20)
        for number in range(60):
            cache.get(number)
        # 40 to 59 are resident, the ghosts of 21 to 39 are left
        cache.get(20)
        cache.get(24)
        cache.get(60)
        order = [cache.numbers[e] for e in cache.policy.victims()]
        assert order.index(20) < order.index(60) < order.index(24)

    def test_it_evicts_what_the_paper_says(self):
        trace = zipf_trace(5000, keys=300, scan_every=200, scan=90)
        for capacity in (3, 20, 90):
            cache, paper = Cache(S3FIFOPolicy(), capacity), S3FIFOByThePaper(capacity)
            for number in trace:
                assert cache.get(number) == paper.get(number)
                assert cache.entries.keys() == paper.uses.keys()


class TestARC:
    def test_seen_once_leaves_before_seen_again(self):
        policy = ARCPolicy()
        fill(policy, range(6))
        policy.touch(3)
        policy.touch(1)
        assert list(policy.victims()) == [0, 2, 4, 5, 3, 1]

    def test_what_returns_moves_the_target(self):
        policy = ARCPolicy()
        fill(policy, range(20))
        for entry in range(10):
            policy.touch(entry)

        def evict_and_return():
            (entry,) = evict(policy, 1)
            policy.add(entry, key(entry))
            return entry

        # each return of one that was seen once asks for one more place for its like...
        assert [evict_and_return() for _ in range(5)] == [10, 11, 12, 13, 14]
        # ...until those seen again have to give, and the return of one of them gives a place back
        assert [evict_and_return() for _ in range(3)] == [0, 15, 1]

    def test_what_was_dropped_is_not_missed(self):
        policy = ARCPolicy()
        fill(policy, range(4))
        policy.remove(0, evicted=False)
        policy.add(0, key(0))
        policy.add(9, key(9))
        assert list(policy.victims()) == [1, 2, 3, 0, 9]

    @pytest.mark.parametrize("capacity", [50, 200])
    def test_it_hits_as_often_as_the_paper_says(self, capacity):
        trace = zipf_trace()
        ratio = Cache(ARCPolicy(), capacity).hit_ratio(trace)
        paper = ARCByThePaper(capacity)
        assert ratio == pytest.approx(sum(map(paper.get, trace)) / len(trace), abs=0.002)


@pytest.mark.parametrize(
    ("new_policy", "survives"),
    [(LRUPolicy, False), (S3FIFOPolicy, True), (ARCPolicy, True)],
    ids=["LRU", "S3FIFO", "ARC"],
)
def test_a_scan_drives_out_the_working_set_only_under_lru(new_policy, survives):
    cache, working_set = Cache(new_policy(), 100), range(50)
    for _ in range(4):
        cache.hit_ratio(working_set)
    cache.hit_ratio(range(1000, 1500))
    assert (cache.hit_ratio(working_set) == 1) is survives


@pytest.mark.parametrize("skew", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("scan_every", [0, 1000], ids=["zipf", "zipf with scans"])
@pytest.mark.parametrize("new_policy", [S3FIFOPolicy, ARCPolicy], ids=["S3FIFO", "ARC"])
def test_it_hits_more_often_than_lru(new_policy, scan_every, skew):
    trace = zipf_trace(skew=skew, scan_every=scan_every)
    lru = Cache(LRUPolicy(), 100).hit_ratio(trace)
    assert Cache(new_policy(), 100).hit_ratio(trace) > 1.1 * lru


@every_policy
def test_asking_again_gives_the_same_victim(new_policy):
    cache = Cache(new_policy(), 50)
    cache.hit_ratio(zipf_trace(2000))
    assert len({next(cache.policy.victims()) for _ in range(10)}) == 1


@every_policy
def test_passing_over_the_pinned_delays_nobody_else(new_policy):
    """Without pins and with the pinned passed over, the others leave in the same order."""
    one, other = Cache(new_policy(), 50), Cache(new_policy(), 50)
    for cache in (one, other):
        cache.hit_ratio(zipf_trace(2000))
    order = list(one.policy.victims())
    pinned = set(order[::3])
    assert evict(other.policy, 50, pinned) == [e for e in order if e not in pinned]


def allocated_by(work):
    """Bytes that `work` allocates and its result keeps."""
    gc.collect()
    tracemalloc.start()
    try:
        result = work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("new_policy", "most"),
    [(LRUPolicy, 10), (S3FIFOPolicy, 20), (ARCPolicy, 19)],
    ids=["LRU", "S3FIFO", "ARC"],
)
def test_memory(new_policy, most):
    """Bytes per resident, and 27 more at most for what it remembers of the evicted."""
    num = 10_000

    def fill_up():
        policy = new_policy()
        fill(policy, range(num))
        return policy

    def turn_over():
        policy = fill_up()
        for i in range(3 * num):
            (victim,) = evict(policy, 1)
            policy.add(victim, key(num + i))
            if i % 3:
                policy.touch(victim)
        return policy

    assert allocated_by(fill_up)[0] <= most * num + 4096
    assert allocated_by(turn_over)[0] <= (most + 27) * num + 4096


class TestLinkedLists:
    def test_order(self):
        lists = LinkedLists(2)
        for item in (5, 1, 3):
            lists.push(0, item)
        lists.move(1, 1)
        lists.move(0, 5)
        assert [list(lists.walk(n)) for n in (0, 1)] == [[3, 5], [1]]
        assert lists.sizes == [2, 1]
        assert lists.remove(1) == 1
        assert list(lists.walk(1)) == []

    @given(st.lists(st.integers(0, 7), max_size=30), st.permutations(range(8)))
    def test_to_renew_is_to_move_in_turn(self, items, order):
        one, other = LinkedLists(2), LinkedLists(2)
        for item in order:
            one.push(1, item)
            other.push(1, item)
        one.renew(1, items)
        for item in items:
            other.move(1, item)
        assert list(one.walk(1)) == list(other.walk(1))
        for lists in (one, other):
            for item in range(8):  # so that the links back are looked at
                lists.remove(item)
            assert list(lists.walk(1)) == []

    def test_an_item_is_on_one_list_at_most(self):
        lists = LinkedLists(2)
        lists.push(0, 4)
        with pytest.raises(AssertionError, match="on a list already"):
            lists.push(1, 4)
        with pytest.raises(AssertionError, match="on no list"):
            lists.remove(3)


class TestGhosts:
    # few low bits, so that buckets fill unevenly, and the ends of the range
    fingerprints = st.integers(0, 40).map(lambda n: n * 0x1000_0000_0000_0010 % 2**64)

    @given(
        st.lists(
            st.tuples(st.sampled_from(["push", "pop", "drop"]), st.integers(0, 1), fingerprints)
        )
    )
    def test_it_is_a_pair_of_ordered_sets(self, history):
        ghosts, model = Ghosts(2), [OrderedDict(), OrderedDict()]
        for what, number, fingerprint in history:
            owner = next((n for n in (0, 1) if fingerprint in model[n]), NONE)
            if what == "pop":
                assert ghosts.pop(fingerprint) == owner
                if owner != NONE:
                    del model[owner][fingerprint]
            elif what == "push" and owner == NONE:
                ghosts.push(number, fingerprint)
                model[number][fingerprint] = True
            elif what == "drop" and model[number]:
                ghosts.drop(number)
                model[number].popitem(last=False)
            assert ghosts.sizes == [len(m) for m in model]

    def test_each_of_many_is_found(self):
        ghosts = Ghosts(3)
        rng = random.Random(3)
        fingerprints = [rng.getrandbits(64) for _ in range(5000)]
        for i, fingerprint in enumerate(fingerprints):
            ghosts.push(i % 3, fingerprint)
        assert [ghosts.pop(f) for f in fingerprints] == [i % 3 for i in range(5000)]
        assert ghosts.sizes == [0, 0, 0]


class S3FIFOByThePaper:
    """Algorithm 1 of the paper, with as many ghosts as residents and never fewer than 16."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.small, self.main, self.ghosts = deque(), deque(), OrderedDict()
        self.uses = {}

    def get(self, number):
        if number in self.uses:
            self.uses[number] = min(3, self.uses[number] + 1)
            return True
        if len(self.uses) == self.capacity:
            self.evict()
        known = self.ghosts.pop(number, False)
        (self.main if known else self.small).append(number)
        self.uses[number] = 0
        return False

    def evict(self):
        while True:
            if len(self.small) * 10 >= len(self.uses):
                number = self.small.popleft()
                if self.uses[number] <= 1:
                    self.ghosts[number] = True
                    break
                self.uses[number] = 0
            else:
                number = self.main.popleft()
                if self.uses[number] == 0:
                    break
                self.uses[number] -= 1
            self.main.append(number)
        del self.uses[number]
        while len(self.ghosts) > max(16, len(self.uses)):
            self.ghosts.popitem(last=False)


class ARCByThePaper:
    """Figure 4 of the paper: here the newcomer is known when room is made for it."""

    def __init__(self, capacity):
        self.c, self.p = capacity, 0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict() for _ in range(4))

    def get(self, x):
        hit = x in self.t1 or x in self.t2
        if hit:
            self.t1.pop(x, None)
            self.t2.pop(x, None)
        elif x in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self.replace(x)
            del self.b1[x]
        elif x in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.replace(x)
            del self.b2[x]
        else:
            self.make_room(x)
            self.t1[x] = True
            return False
        self.t2[x] = True
        return hit

    def replace(self, x):
        t1 = len(self.t1)
        from_t1 = t1 and (t1 > self.p or (x in self.b2 and t1 == self.p))
        here, there = (self.t1, self.b1) if from_t1 else (self.t2, self.b2)
        there[here.popitem(last=False)[0]] = True

    def make_room(self, x):
        seen_once = len(self.t1) + len(self.b1)
        total = seen_once + len(self.t2) + len(self.b2)
        if seen_once == self.c:
            if self.b1:
                self.b1.popitem(last=False)
                self.replace(x)
            else:
                self.t1.popitem(last=False)
        elif total >= self.c:
            if total == 2 * self.c:
                self.b2.popitem(last=False)
            self.replace(x)
