"""A chain of keys names prefixes: two sequences share keys as far as they share tokens."""

from __future__ import annotations

import pytest
import rig
from hypothesis import given
from hypothesis import strategies as st

from lmcache.core.chain import KeyChain
from lmcache.core.keys import Identity, Insert, next_key, root_key

PAGE, CHUNK = rig.PAGE_TOKENS, rig.CHUNK_TOKENS


class Counted(list):
    """A list that knows how often it was cut."""

    cuts = 0

    def __getitem__(self, index):
        self.cuts += isinstance(index, slice)
        return super().__getitem__(index)


def test_full_chunks_build_on_each_other():
    sequence = rig.tokens(3 * CHUNK)
    chain = rig.chain(sequence)
    key = root_key(rig.NAMESPACE, Identity())
    for chunk in range(3):
        start = chunk * CHUNK
        key = next_key(key, sequence[start : start + CHUNK], start)
        assert chain.key(chunk) == key


def test_a_tail_builds_on_the_full_chunks_before_it():
    sequence = rig.tokens(2 * CHUNK)
    chain = rig.chain(sequence)
    before = rig.chain(sequence).key(0)
    assert chain.tail(1, 3) == next_key(before, sequence[CHUNK : CHUNK + 3 * PAGE], CHUNK)


@pytest.mark.parametrize("first", [lambda c: c.key(2), lambda c: c.tail(2, 1), lambda c: c.key(0)])
def test_the_order_of_questions_does_not_matter(first):
    chain, other = rig.chain(rig.tokens(3 * CHUNK)), rig.chain(rig.tokens(3 * CHUNK))
    first(chain)
    assert [chain.key(i) for i in (1, 0, 2)] == [other.key(i) for i in (1, 0, 2)]
    assert chain.tail(2, 1) == other.tail(2, 1)


def test_a_part_is_a_tail_or_the_whole():
    chain = rig.chain(rig.tokens(CHUNK))
    parts = [chain.part(0, pages) for pages in range(1, rig.PAGES_PER_CHUNK + 1)]
    assert parts == [*(chain.tail(0, pages) for pages in (1, 2, 3)), chain.key(0)]
    assert len(set(parts)) == rig.PAGES_PER_CHUNK


def test_a_key_is_computed_once():
    sequence = Counted(rig.tokens(3 * CHUNK))
    chain = rig.chain(sequence)
    for _ in range(3):
        chain.key(2)
        chain.tail(2, 2)
    assert sequence.cuts == 4


def test_nothing_is_computed_before_it_is_asked_for():
    sequence = Counted(rig.tokens(3 * CHUNK))
    rig.chain(sequence)
    assert sequence.cuts == 0


def test_the_tokens_may_grow():
    sequence = rig.tokens(2 * CHUNK)
    grown = sequence[: CHUNK + PAGE]
    chain = rig.chain(grown)
    tail = chain.tail(1, 1)
    grown += sequence[CHUNK + PAGE :]
    assert chain.tail(1, 1) == tail
    assert chain.key(1) == rig.chain(sequence).key(1)


@pytest.mark.parametrize("ask", [lambda c: c.key(1), lambda c: c.tail(1, 2)])
def test_there_is_no_key_beyond_the_last_token(ask):
    with pytest.raises(AssertionError, match="beyond the last token"):
        ask(rig.chain(rig.tokens(CHUNK + 2 * PAGE - 1)))


def test_inserts_count_where_they_are():
    plain, sequence = rig.chain(rig.tokens(3 * CHUNK)), rig.tokens(3 * CHUNK)
    shown = KeyChain(
        root_key(rig.NAMESPACE, Identity()),
        sequence,
        page_tokens=PAGE,
        pages_per_chunk=rig.PAGES_PER_CHUNK,
        inserts=[Insert("image", CHUNK + PAGE, 2)],
    )
    assert shown.key(0) == plain.key(0)
    assert shown.tail(1, 1) == plain.tail(1, 1)
    assert shown.tail(1, 2) != plain.tail(1, 2)
    assert shown.key(1) != plain.key(1)
    assert shown.key(2) != plain.key(2)  # it builds on a chunk that shows something else


@pytest.mark.parametrize(
    ("chunk", "stop", "pages"),
    [
        (0, 0, 0),
        (0, PAGE - 1, 0),
        (0, PAGE, 1),
        (0, PAGE + 1, 1),
        (0, CHUNK - 1, rig.PAGES_PER_CHUNK - 1),
        (0, CHUNK, rig.PAGES_PER_CHUNK),
        (0, CHUNK + 1, rig.PAGES_PER_CHUNK),
        (1, CHUNK - 1, 0),
        (1, CHUNK + PAGE - 1, 0),
        (1, CHUNK + PAGE, 1),
        (5, CHUNK, 0),
    ],
)
def test_pages_in(chunk, stop, pages):
    assert rig.chain([]).pages_in(chunk, stop) == pages


few = st.lists(st.integers(0, 1), max_size=2 * CHUNK)


@given(few, few, few)
def test_keys_are_shared_as_far_as_tokens_are(shared, one, other):
    one, other = shared + one, shared + other
    differ = (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y)
    common = next(differ, min(len(one), len(other)))
    a, b = rig.chain(one), rig.chain(other)
    for chunk in range(4):
        pages = min(a.pages_in(chunk, len(one)), b.pages_in(chunk, len(other)))
        for count in range(1, pages + 1):
            same = chunk * CHUNK + count * PAGE <= common
            assert (a.part(chunk, count) == b.part(chunk, count)) is same


@given(st.lists(st.integers(0, 2**32 - 1), max_size=3 * CHUNK))
def test_a_page_of_one_token(sequence):
    chain = KeyChain(bytes(32), sequence, page_tokens=1, pages_per_chunk=CHUNK)
    whole, rest = divmod(len(sequence), CHUNK)
    assert chain.pages_in(whole, len(sequence)) == rest
    keys = [chain.key(i) for i in range(whole)]
    keys += [chain.tail(whole, n) for n in range(1, rest + 1)]
    assert len(set(keys)) == whole + rest


def test_it_says_which_keys_it_has():
    chain = rig.chain(rig.tokens(4 * rig.CHUNK_TOKENS))
    for chunks in range(4):
        assert chain.has_keys((chunks + 1) * rig.CHUNK_TOKENS - 1)
        assert not chain.has_keys((chunks + 1) * rig.CHUNK_TOKENS)
        chain.key(chunks)
