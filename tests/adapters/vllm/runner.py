"""The worker's half of a fake vLLM: pages that are real tensors, and a forward pass without a
model.

The order in which the connector is called is that of vLLM's own model runners; `loads` says of
which
version. Every word that a forward pass reads is checked.
"""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from fake_codes import FIRST_OUTPUT, OUTPUTS, Codes, sample, words
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

GARBAGE = 0xA5
WRONG_TOKEN = FIRST_OUTPUT + OUTPUTS + 1
"""What the fake model samples if a page it read was wrong."""


@dataclass
class Sequence:
    """What a model runner keeps of one request."""

    tokens: list[int]
    prompt: int
    tables: list[list[int]]
    """Its pages, by cache group."""
    codes: Codes
    read_wrong: bool = False
    """Some rank attended to a wrong page in this layer."""
    poisoned: bool = False
    """So the input of every later layer is wrong, on all ranks."""


class Seen(NamedTuple):
    """What one layer of a step has to do with a request."""

    name: str
    sequence: Sequence
    pages: list[int]
    tokens: np.ndarray
    """What its pages must hold: (tokens, heads, words)."""
    start: int
    """The first that is new."""
    first: int
    """The first that is attended to."""


def wrapper_in(connector: Any) -> Any:
    """vLLM's wrapper of our connector, alone or among others."""
    parts = getattr(connector, "_connectors", [connector])
    return next(part for part in parts if hasattr(part, "_lmcache_engine"))


def impl_of(connector: Any) -> Any:
    """Our connector, which vLLM may have wrapped."""
    return connector if hasattr(connector, "count_error") else wrapper_in(connector)._lmcache_engine


class Rank:
    """One worker: its connector and its pages."""

    def __init__(self, number: int, connector: Any, kv_caches: dict[str, torch.Tensor]) -> None:
        """Give every page a content that no model would."""
        self.number = number
        self.connector = connector
        self.kv_caches = kv_caches
        self.code_rank = number
        """Ranks that hold the same bytes share it."""
        for layer in self.layers:
            layer[:] = np.uint64(int.from_bytes(bytes([GARBAGE]) * 8, "little")).astype(np.int64)

    @property
    def layers(self) -> list[np.ndarray]:
        """Every layer as words: (pages, heads, tokens, words). What is lent moves once."""
        return [tensor.view(torch.int64).numpy() for tensor in self.kv_caches.values()]

    @property
    def impl(self) -> Any:
        """Our connector inside vLLM's wrapper."""
        return impl_of(self.connector)

    @property
    def side(self) -> Any:
        return self.impl._worker

    @property
    def mover(self) -> Any:
        """What the latest attachment granted."""
        return self.side.grants.latest.mover

    @mover.setter
    def mover(self, mover: Any) -> None:
        grants = self.side.grants
        grants.latest = grants.latest._replace(mover=mover)

    def content(self, layer: int, pages: Iterable[int]) -> np.ndarray:
        """What these pages hold: (tokens, heads, words)."""
        found = self.layers[layer][list(pages)]  # (pages, heads, tokens, words)
        return np.moveaxis(found, 2, 1).reshape(-1, found.shape[1], found.shape[3])


class Runner:
    """Runs the steps of vLLM's scheduler on all ranks of one engine."""

    def __init__(self, ranks: list[Rank], page_tokens: int, groups: list[list[int]]) -> None:
        self.ranks = ranks
        self.page_tokens = page_tokens
        self.group_of = {layer: i for i, layers in enumerate(groups) for layer in layers}
        """The cache group of each layer, by number."""
        self.stream: Any = None
        """Where the forward pass is computed; at once if there is none."""
        self.windows: list[int | None] = [None] * len(groups)
        """How far back each group looks."""
        self.received: dict[int, set[str]] = defaultdict(set)
        """Requests that got their loads outside the batch, by rank, and not on all ranks yet."""
        self.sequences: dict[str, Sequence] = {}
        self.loads = "late"
        """`early`: as up to 0.28, before every forward pass; `late`: as since 0.29."""
        self.runs_ahead = False
        """What is sampled is known before it is computed, as no real model can: the next step is
        begun while a device still computes this one."""
        self.full_graph = False
        """No hook of a layer is called, and there is no attention metadata."""
        self.pickled = False
        """The step crosses a process boundary."""
        self.drafter = False
        """Errors are asked for before stores are finished, as with speculative decoding."""
        self.failed: set[str] = set()
        """Of those, the ones that did not get all of it."""
        self.refused: set[str] = set()
        """All that ever were."""
        self.invalid: list[set[int]] = []
        """Pages reported in each step."""
        self.wrong: list[dict[str, set[int]]] = []
        """Pages that each request read in each step and that did not hold what they should."""
        self.events: list[Any] = []

    def check_wrong(self, depth: int) -> None:
        """Every wrong page was reported, in its step or one of `depth - 1` before it."""
        for step, wrong in enumerate(self.wrong):
            reported = set().union(*self.invalid[max(0, step - depth + 1) : step + 1])
            for name, pages in wrong.items():
                assert pages & reported, f"step {step}: {name} read {pages} unnoticed"

    # ---- the requests

    def _update(self, scheduled: Any) -> dict[str, int]:
        """Take note of what is new; tokens computed before this step, by request."""
        for request_id in scheduled.finished_req_ids:
            self.sequences.pop(request_id, None)
        before = {}
        for new in scheduled.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids or new.prompt_token_ids or [])
            images = [
                (item.identifier, item.mm_position.offset, item.mm_position.length)
                for item in new.mm_features
            ]
            lora = new.lora_request.lora_name if new.lora_request else ""
            self.sequences[new.req_id] = Sequence(
                tokens,
                len(new.prompt_token_ids),
                [list(ids) for ids in new.block_ids],
                Codes(lora, images),
            )
            before[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            sequence = self.sequences[request_id]
            fresh = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                sequence.tables = [list(ids) for ids in fresh]
                sequence.tokens = list(cached.all_token_ids.get(request_id, sequence.tokens))
            elif fresh:
                for table, ids in zip(sequence.tables, fresh, strict=True):
                    table.extend(ids)
            del sequence.tokens[sequence.prompt + cached.num_output_tokens[i] :]
            before[request_id] = cached.num_computed_tokens[i]
        return before

    # ---- one step

    def execute(self, scheduled: Any) -> ModelRunnerOutput:
        before = self._update(scheduled)
        counts = scheduled.num_scheduled_tokens
        after = {name: before[name] + count for name, count in counts.items()}
        self.wrong.append({})
        output = KVConnectorOutput()
        running = [self._run(rank, scheduled, before, after, output) for rank in self.ranks]
        for _ in zip_longest(*running):  # layer by layer, as ranks wait for each other's sums
            for name in counts:
                sequence = self.sequences[name]
                sequence.poisoned |= sequence.read_wrong
        if self.stream and not self.runs_ahead:
            self.stream.synchronize()
        self.invalid.append(output.invalid_block_ids)
        sampled = [self._sample(name, after[name]) for name in counts]
        return ModelRunnerOutput(
            req_ids=list(counts),
            req_id_to_index={name: i for i, name in enumerate(counts)},
            sampled_token_ids=sampled,
            kv_connector_output=None if output.is_empty() else output,
        )

    def _sample(self, name: str, after: int) -> list[int]:
        sequence = self.sequences[name]
        poisoned = sequence.poisoned
        sequence.poisoned = sequence.read_wrong = False
        if after < len(sequence.tokens):
            return []
        token = sample(int(sequence.codes.upto(sequence.tokens)[after - 1]))
        if poisoned:
            token = WRONG_TOKEN
        sequence.tokens.append(token)
        return [token]

    def _run(
        self, rank: Rank, scheduled: Any, before: dict, after: dict, output: KVConnectorOutput
    ) -> Iterator[int]:
        """One rank's step; yields after each layer."""
        connector, meta = rank.connector, scheduled.kv_connector_metadata
        meta = pickle.loads(pickle.dumps(meta)) if self.pickled else meta
        idle = not after
        has_metadata = not idle and not self.full_graph
        names = list(rank.kv_caches)
        context = SimpleNamespace(attn_metadata=dict.fromkeys(names, ()) if has_metadata else None)
        connector.bind_connector_metadata(meta)
        loads_now = self.loads == "early" or scheduled.has_sync_kv_loads
        if loads_now:
            connector.start_load_kv(context)
        for layer, name in enumerate(names):
            if has_metadata:
                connector.wait_for_layer_load(name)
            self._attend(rank, layer, before, after)
            if has_metadata:
                connector.save_kv_layer(name, rank.kv_caches[name], ())
            yield layer
        if not loads_now:
            connector.start_load_kv(context)
        if not self.drafter and not (idle and self.loads == "early"):
            connector.wait_for_save()
        self._hear(rank, connector.get_transfer_results(scheduled.finished_req_ids), output)
        output.invalid_block_ids |= connector.get_block_ids_with_load_errors()
        if events := connector.get_kv_connector_kv_cache_events():
            self.events.append(copy.copy(events))
        if self.drafter:
            connector.wait_for_save()
        connector.clear_connector_metadata()

    def _hear(self, rank: Rank, results: Any, output: KVConnectorOutput) -> None:
        """Loads outside the batch have ended when they have on every rank."""
        assert not results.finished_sending
        assert results.failed_recving <= results.finished_recving
        self.received[rank.number] |= results.finished_recving
        self.failed |= results.failed_recving
        self.refused |= results.failed_recving
        everywhere = set.intersection(*(self.received[rank.number] for rank in self.ranks))
        for names in self.received.values():
            names.difference_update(everywhere)
        output.finished_recving = (output.finished_recving or set()) | everywhere
        output.failed_recving = (output.failed_recving or set()) | (self.failed & everywhere)
        self.failed -= everywhere

    def _attend(self, rank: Rank, layer: int, before: dict, after: dict) -> None:
        """Write the new tokens of all requests, then read everything each of them attends to."""
        seen = [self._seen(rank, layer, name, before[name], stop) for name, stop in after.items()]
        compute = partial(self._compute, rank, layer, seen, self.wrong[-1])
        if self.stream:
            self.stream.call(compute)
        else:
            compute()

    def _seen(self, rank: Rank, layer: int, name: str, start: int, stop: int) -> Seen:
        """A request as it is now: it may be another one when the layer is computed."""
        sequence, size = self.sequences[name], self.page_tokens
        group = self.group_of[layer]
        codes = sequence.codes.upto(sequence.tokens)[:stop]
        assert len(codes) == stop, f"{name} computes tokens nobody knows"
        _, heads, _, per_head = rank.layers[layer].shape
        tokens = words(codes, layer, rank.code_rank, heads, per_head).astype(np.int64)
        pages = sequence.tables[group][: -(-stop // size)]
        assert 0 not in pages[start // size :], f"{name} writes to vLLM's null page"
        window = self.windows[group]  # the first token of the step looks back furthest
        first = 0 if window is None else max(0, start + 1 - window)
        return Seen(name, sequence, list(pages), tokens, start, first)

    def _compute(
        self, rank: Rank, layer: int, seen: list[Seen], wrong: dict[str, set[int]]
    ) -> None:
        cache, size = rank.layers[layer], self.page_tokens
        for one in seen:
            new = one.tokens[one.start :]
            if one.sequence.poisoned:
                new = ~new
            positions = np.arange(one.start, len(one.tokens))
            cache[np.array(one.pages)[positions // size], :, positions % size, :] = new
        for one in seen:
            found = rank.content(layer, one.pages)[: len(one.tokens)]
            same = (found == one.tokens).all(axis=(1, 2))
            same[: one.first] = True
            if not same.all():
                bad = {one.pages[position // size] for position in np.flatnonzero(~same)}
                wrong.setdefault(one.name, set()).update(bad)
                one.sequence.read_wrong = True
