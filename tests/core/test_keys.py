"""Keys are what docs/keys.md says, everywhere, and never the same for two different inputs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import assume, given
from hypothesis import strategies as st

from lmcache.core.keys import Identity, Insert, Namespace, next_key, root_key

NAMESPACE = Namespace(
    model="meta-llama/Llama-3.1-8B@5206a32",
    generation="7",
    dtype="bfloat16",
    layout="ab" * 32,
    group=3,
    parallel="tp2.pp1",
)
IDENTITY = Identity(lora="sql-adapter@2", salt="tenant-é")
TOKENS = [0, 1, 128_000, 2**32 - 1]
INSERT = Insert("sha256:0123456789abcdef", 6, 3)

# these may change only together with SCHEMA, and then whatever is stored anywhere is lost
GOLDEN = {
    "plain root": "23e1a394fe89f312079f924cda122b0106d0b8242aa7ab36952b74aa045a8866",
    "root": "8d2dade134b23e4e2889af661ec54a23f4bcbbacc471957f7722eeb6ec0af7c1",
    "chunk": "6134d3e626c8f065251f3bfcafaf0f0e103acf18c05436f2a33ef8c567b3586f",
    "tail": "2286fc12296962e22e085e90df7822f9eec2e1dded73c0f84c4b61f4605e57af",
    "second": "215cb1254e11ba10a5b2899e893fe28b76ea63cf191db1ae50c8fa021d986d65",
    "insert": "d356ca14cce3ed6d187d5be80a35e04801ad22a3a0407c0f91c5891f37449e56",
}


def vectors():
    root = root_key(NAMESPACE, IDENTITY)
    chunk = next_key(root, TOKENS, 0)
    return {
        "plain root": root_key(Namespace(model="m", dtype="d", layout="l"), Identity()).hex(),
        "root": root.hex(),
        "chunk": chunk.hex(),
        "tail": next_key(root, TOKENS[:2], 0).hex(),
        "second": next_key(chunk, TOKENS, 4).hex(),
        "insert": next_key(chunk, TOKENS, 4, [INSERT]).hex(),
    }


def test_golden_vectors():
    assert vectors() == GOLDEN


@pytest.mark.parametrize("seed", ["0", "1", "4294967295", "random"])
def test_keys_do_not_depend_on_the_process(seed):
    program = "import json, runpy, sys; print(json.dumps(runpy.run_path(sys.argv[1])['vectors']()))"
    answer = subprocess.run(
        [sys.executable, "-c", program, __file__],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        check=True,
    )
    assert json.loads(answer.stdout) == GOLDEN


def field(tag, value):
    """A second reading of docs/keys.md."""
    return bytes([len(tag)]) + len(value).to_bytes(8, "little") + tag.encode() + value


def text(tag, value):
    return field(tag, b"s" + value.encode())


def number(tag, value):
    return field(tag, b"i" + value.to_bytes(8, "little", signed=True))


def test_a_root_is_what_the_document_says():
    said = (
        field("lmcache.schema", b"\1\0\0\0")
        + text("Namespace.model", NAMESPACE.model)
        + text("Namespace.generation", NAMESPACE.generation)
        + text("Namespace.dtype", NAMESPACE.dtype)
        + text("Namespace.layout", NAMESPACE.layout)
        + number("Namespace.group", NAMESPACE.group)
        + text("Namespace.parallel", NAMESPACE.parallel)
        + text("Identity.lora", IDENTITY.lora)
        + text("Identity.salt", IDENTITY.salt)
    )
    assert root_key(NAMESPACE, IDENTITY) == blake3(said).digest()


def test_a_chunk_is_what_the_document_says():
    previous = bytes(range(32))
    inserts = [Insert("late", 130, 9), Insert("early", 90, 20), Insert("over", 128, 4)]
    tokens = [*TOKENS, *[5] * 28]  # positions 100 .. 131, of which "late" overlaps two
    said = (
        previous
        + (32).to_bytes(4, "little")
        + b"".join(token.to_bytes(4, "little") for token in tokens)
        + text("Insert.identifier", "early")
        + number("Insert.offset", -10)
        + number("Insert.length", 20)
        + text("Insert.identifier", "over")
        + number("Insert.offset", 28)
        + number("Insert.length", 4)
        + text("Insert.identifier", "late")
        + number("Insert.offset", 30)
        + number("Insert.length", 9)
    )
    assert next_key(previous, tokens, 100, inserts) == blake3(said).digest()


TEXT_FIELDS = [(Namespace, f.name) for f in fields(Namespace) if f.name != "group"] + [
    (Identity, f.name) for f in fields(Identity)
]
PAIRS = list(combinations(TEXT_FIELDS, 2))


def key_with(changes):
    """The root key of the sample deployment with some of its fields changed."""
    by_record = {Namespace: NAMESPACE, Identity: IDENTITY}
    for (record, name), value in changes.items():
        by_record[record] = replace(by_record[record], **{name: value})
    return root_key(by_record[Namespace], by_record[Identity])


def value_of(where):
    record, name = where
    return getattr(NAMESPACE if record is Namespace else IDENTITY, name)


def test_every_field_is_tested():
    assert len(TEXT_FIELDS) + 1 == len(fields(Namespace)) + len(fields(Identity))


@given(where=st.sampled_from(TEXT_FIELDS), value=st.text())
def test_changing_a_field_changes_the_key(where, value):
    assume(value != value_of(where))
    assert key_with({where: value}) != key_with({})


@given(st.integers(-(2**63), 2**63 - 1))
def test_changing_the_group_changes_the_key(group):
    assume(group != NAMESPACE.group)
    assert key_with({(Namespace, "group"): group}) != key_with({})


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda w: w[1])
def test_swapping_two_fields_changes_the_key(one, other):
    assert key_with({one: value_of(other), other: value_of(one)}) != key_with({})


@given(pair=st.sampled_from(PAIRS), value=st.text(min_size=1), cut=st.integers(0, 50))
def test_no_two_divisions_of_a_text_share_a_key(pair, value, cut):
    """Neither a move of the boundary between two fields nor of the whole to the other."""
    one, other = pair
    cut %= len(value)
    divided = key_with({one: value[:cut], other: value[cut:]})
    assert divided != key_with({one: value, other: ""})


def test_text_and_numbers_do_not_mix():
    # the eight bytes of 0x3131313131313131 are the text "11111111"
    number_key = root_key(replace(NAMESPACE, group=0x3131313131313131), IDENTITY)
    text_key = root_key(replace(NAMESPACE, group="11111111"), IDENTITY)  # type: ignore[arg-type]
    assert number_key != text_key


tokens_of_a_chunk = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


@given(tokens_of_a_chunk, st.integers(0, 39), st.integers(0, 2**32 - 1))
def test_changing_a_token_changes_the_key(tokens, at, token):
    at %= len(tokens)
    assume(tokens[at] != token)
    changed = [*tokens[:at], token, *tokens[at + 1 :]]
    assert next_key(bytes(32), tokens, 0) != next_key(bytes(32), changed, 0)


@given(tokens_of_a_chunk, st.integers(0, 40))
def test_a_shorter_chunk_has_another_key(tokens, length):
    assume(length < len(tokens))
    assert next_key(bytes(32), tokens, 0) != next_key(bytes(32), tokens[:length], 0)


def test_the_chunk_before_counts():
    assert next_key(bytes(32), TOKENS, 0) != next_key(b"\1" + bytes(31), TOKENS, 0)


def test_tokens_may_come_in_any_sequence():
    assert next_key(bytes(32), np.array(TOKENS, np.int64), 0) == next_key(bytes(32), TOKENS, 0)
    assert next_key(bytes(32), tuple(TOKENS), 0) == next_key(bytes(32), TOKENS, 0)


@pytest.mark.parametrize("token", [-1, 2**32, 2**64, 1.0, "1", None])
def test_what_is_no_token_id_has_no_key(token):
    with pytest.raises((OverflowError, TypeError)):
        next_key(bytes(32), [1, token], 0)


class TestInserts:
    """The same placeholder tokens, with something else behind them."""

    START, COUNT = 100, 16

    def key(self, *inserts):
        return next_key(bytes(32), [9] * self.COUNT, self.START, inserts)

    def test_what_is_shown_counts(self):
        assert self.key(Insert("a", 104, 4)) != self.key(Insert("b", 104, 4))
        assert self.key(Insert("a", 104, 4)) != self.key()

    def test_where_it_begins_counts(self):
        assert self.key(Insert("a", 104, 4)) != self.key(Insert("a", 105, 4))

    def test_how_long_it_is_counts(self):
        assert self.key(Insert("a", 104, 4)) != self.key(Insert("a", 104, 5))

    def test_how_much_of_it_came_before_counts(self):
        assert self.key(Insert("a", 90, 20)) != self.key(Insert("a", 91, 19))

    def test_the_whole_identifier_counts(self):
        long = "f" * 127
        assert self.key(Insert(long + "0", 104, 4)) != self.key(Insert(long + "1", 104, 4))

    def test_which_is_where_counts(self):
        swapped = self.key(Insert("b", 101, 2), Insert("a", 108, 2))
        assert self.key(Insert("a", 101, 2), Insert("b", 108, 2)) != swapped

    def test_the_same_twice_is_not_the_same_once(self):
        one = Insert("a", 104, 4)
        assert self.key(one, one) != self.key(one)

    def test_the_order_in_which_they_are_named_does_not_count(self):
        inserts = [Insert(c, 100 + i % 3, 1 + i % 2) for i, c in enumerate("abcdef")]
        shuffled = random.Random(0).sample(inserts, len(inserts))
        assert self.key(*inserts) == self.key(*shuffled)

    @pytest.mark.parametrize(
        ("offset", "length", "counts"),
        [
            (96, 4, False),
            (96, 5, True),
            (99, 1, False),
            (100, 1, True),
            (115, 1, True),
            (116, 1, False),
            (0, 1000, True),
        ],
    )
    def test_only_those_that_overlap_count(self, offset, length, counts):
        assert (self.key(Insert("a", offset, length)) != self.key()) is counts


def test_no_two_of_many_keys_are_equal():
    """Adversarial rather than uniform: few tokens, short chunks, chains of different lengths."""
    rng = random.Random(0)
    seen, inputs = set(), set()
    keys = [bytes(32)]
    while len(inputs) < 100_000:
        previous = keys[rng.randrange(len(keys))]
        tokens = tuple(rng.choices((0, 1, 256, 65536), k=rng.randint(1, 8)))
        if (previous, tokens) in inputs:
            continue
        inputs.add((previous, tokens))
        key = next_key(previous, tokens, 0)
        assert key not in seen
        seen.add(key)
        keys.append(key)
