"""A connector that does no more than the contract asks, and all of that."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace

import tensorrt_llm
import torch
from blake3 import blake3
from dict_store import Store

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ImportError:
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )

STORE = Store()
CHOICES = SimpleNamespace(
    chunk=64,
    saves_later=False,
    loads_later=False,
    stages=True,  # a save takes a copy on the stream, so that blocks may be freed under it
    polls=2,  # how often somebody must ask about what comes later
    slow={},  # and how much more often on some ranks
    states=16,  # requests may end without a word, so there is a bound
    # the oldest version, which has no such hook, forgets all but one of those that end at once
    one_by_one=not hasattr(KvCacheConnectorWorker, "register_forward_pass_callable"),
)


@dataclass
class Piece:
    """Blocks of one chunk, from its block number `first` on, for each group of layers."""

    key: bytes
    first: int
    tables: list


@dataclass
class Job:
    """What is to be copied for a request."""

    id: int
    pieces: list
    later: bool = False


@dataclass
class State:
    """What the scheduler knows of a request."""

    identity: tuple
    tokens: list
    device: int
    end: int
    later: bool
    tables: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    saved: int = 0
    has_saves: bool = False


def identity_of(request):
    """All that makes equal tokens mean something else."""
    names = ("cache_salt", "cache_salt_id", "lora_task_id")
    names += ("multimodal_hashes", "multimodal_positions", "multimodal_lengths")
    return tuple(getattr(request, name, None) for name in names)


class Scheduler(KvCacheConnectorScheduler):
    identity_of = staticmethod(identity_of)

    def __init__(self, llm_args):
        super().__init__(llm_args)
        self.bs = llm_args.kv_cache_config.tokens_per_block
        self.states = OrderedDict()
        self.waiting = []

    # --- what there is

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        device, tokens = num_computed_tokens, request.get_tokens(0)
        identity = self.identity_of(request)
        state = State(identity, tokens, device, device, CHOICES.loads_later)
        self.drop(request.request_id)
        self.states[request.request_id] = state
        while len(self.states) > CHOICES.states:
            self.drop(next(iter(self.states)))
        if device % self.bs == 0:
            state.end = max(device, self.promise(request.request_id, state, len(tokens)))
        if state.end == device:
            self.unpin(request.request_id)
        return state.end - device, state.later and state.end > device

    def promise(self, request_id, state, length):
        self.fetch(self.keys(state))
        hits = STORE.pin(request_id, self.keys(state)) * CHOICES.chunk
        return min(hits, (length - 1) // self.bs * self.bs)

    @staticmethod
    def fetch(keys):
        """Wait for slower tiers."""
        while STORE.fetch(keys):
            time.sleep(0.001)

    def keys(self, state):
        """Of all whole chunks of what is known."""
        chunk = CHOICES.chunk
        while (len(state.keys) + 1) * chunk <= len(state.tokens):
            at = len(state.keys) * chunk
            before = state.keys[-1] if state.keys else repr(state.identity).encode()
            part = repr(state.tokens[at : at + chunk]).encode()
            state.keys.append(blake3(before + part).digest(16))
        return state.keys

    def unpin(self, request_id):
        STORE.unpin(request_id)

    def drop(self, request_id):
        if self.states.pop(request_id, None):
            self.unpin(request_id)

    # --- where it goes

    def update_state_after_alloc(self, request, block_ids):
        self.update_state_after_alloc_by_layer_group(request, [block_ids])

    def update_state_after_alloc_by_layer_group(self, request, block_ids_by_layer_group):
        state = self.states.get(request.request_id)
        if state:
            state.tables = [list(blocks) for blocks in block_ids_by_layer_group]
            if state.later and state.end > state.device:
                self.waiting.append(request.request_id)

    def build_connector_meta(self, scheduler_output):
        waiting, self.waiting = self.waiting, []
        loads = [self.load(request_id, self.states[request_id]) for request_id in waiting]
        saves = []
        for data in scheduler_output.new_requests:
            state = self.states.get(data.request_id)
            if state:
                state.tables = [list(blocks) for blocks in groups_of(data)]
                promised = 0 if state.later else state.end - state.device
                loads += [self.load(data.request_id, state)] if promised else []
                saves += self.saves(data, state, data.computed_position + promised)
        for data in scheduler_output.cached_requests:
            state = self.states.get(data.request_id)
            if state:
                state.tokens += data.new_tokens
                for table, blocks in zip(state.tables, groups_of(data), strict=True):
                    table.extend(blocks)
                saves += self.saves(data, state, data.computed_position)
        return (loads, saves) if loads or saves else None

    def load(self, request_id, state):
        chunks = range(state.device // CHOICES.chunk, -(-state.end // CHOICES.chunk))
        pieces = [self.piece(state, chunk, state.device, state.end) for chunk in chunks]
        return Job(request_id, pieces, state.later)

    def piece(self, state, chunk, start, end):
        first = chunk * CHOICES.chunk // self.bs
        begin = max(start // self.bs, first)
        until = min(end // self.bs, first + CHOICES.chunk // self.bs)
        tables = [table[begin:until] for table in state.tables]
        return Piece(state.keys[chunk], begin - first, tables)

    def saves(self, data, state, position):
        """The chunks that this pass completes."""
        valid = min(position + data.num_scheduled_tokens, len(state.tokens))
        self.keys(state)
        fresh = range(state.saved, valid // CHOICES.chunk)
        state.saved = max(state.saved, fresh.stop)
        pieces = [self.piece(state, chunk, 0, valid) for chunk in fresh]
        state.has_saves |= bool(pieces)
        return [Job(data.request_id, pieces, CHOICES.saves_later)] if pieces else []

    # --- how it ends

    def request_finished(self, request, cache_block_ids):
        return self.request_finished_by_layer_group(request, [cache_block_ids])

    def request_finished_by_layer_group(self, request, cache_block_ids_by_layer_group):
        state = self.states.get(request.request_id)
        self.drop(request.request_id)
        return bool(state and state.has_saves and CHOICES.saves_later)

    def cancel_load(self, request, start, end):
        state = self.states[request.request_id]
        state.end = min(state.end, start)
        if state.end == state.device:
            self.unpin(request.request_id)

    def request_reset(self, request):
        self.drop(request.request_id)


def groups_of(data):
    return getattr(data, "new_block_ids_by_layer_group", None) or [data.new_block_ids]


class Worker(KvCacheConnectorWorker):
    def __init__(self, llm_args):
        super().__init__(llm_args)
        self.rank = tensorrt_llm.mpi_rank()
        self.polls = CHOICES.polls + CHOICES.slow.get(self.rank, 0)
        self.groups, self.saves = [], []
        self.saving, self.granted, self.loading = [], [], {}

    def register_kv_caches(self, kv_cache_tensor):
        self.groups = [[kv_cache_tensor.flatten(1)]]
        STORE.shards.add((self.rank, 0))

    def register_kv_cache_layout(self, layout):
        self.groups = [[r.as_tensor(torch.uint8) for r in group.regions] for group in layout.groups]
        STORE.shards |= {(self.rank, number) for number in range(len(self.groups))}

    # --- loads

    def start_load_kv(self, stream):
        meta = self.get_connector_meta()
        self._clear_connector_meta()
        loads, self.saves, *_ = meta or ([], [])
        for job in loads:
            if job.later:
                self.loading[job.id] = [job, self.polls, stream.record_event()]
            else:
                stream.synchronize()
                self.load(job)

    def load(self, job):
        for piece in job.pieces:
            for number in range(len(self.groups)):
                self.load_piece(piece, number)
        STORE.unpin(job.id, [(self.rank, number) for number in range(len(self.groups))])

    def load_piece(self, piece, number):
        data = STORE.get((self.rank, number), piece.key)
        if data is None:
            raise RuntimeError("what was promised is gone")
        for at, block in enumerate(piece.tables[number]):
            if block >= 0:
                for region, part in zip(self.groups[number], data, strict=True):
                    region[block] = part[piece.first + at]

    def wait_for_layer_load(self, layer_idx, stream):
        pass

    def save_kv_layer(self, layer_idx, stream):
        pass

    # --- saves

    def wait_for_save(self, stream):
        for job in self.saves:
            if job.later:
                self.submit(job, stream)
            else:
                stream.synchronize()
                self.put(self.read(job))
        self.saves = []

    def submit(self, job, stream):
        taken = []
        if CHOICES.stages:
            stream.enqueue(lambda: taken.extend(self.read(job)))
        self.saving.append([job, self.polls, stream.record_event(), taken])

    def read(self, job):
        """Copies of what the blocks hold now."""
        read = []
        for piece in job.pieces:
            for number, (regions, table) in enumerate(zip(self.groups, piece.tables, strict=True)):
                if min(table) >= 0:
                    data = [region[table].clone() for region in regions]
                    read.append(((self.rank, number), piece.key, data))
        return read

    def put(self, read):
        for chunk in read:
            STORE.put(*chunk)

    def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
        self.granted += finished_gen_req_ids
        for save in list(self.saving):
            save[1] -= 1
            if save[1] <= 0 and save[2].query():
                self.put(save[3] or self.read(save[0]))
                self.saving.remove(save)
        busy = {save[0].id for save in self.saving}
        due = self.granted[:1] if CHOICES.one_by_one else self.granted
        saved = [each for each in due if each not in busy]
        self.granted = [each for each in self.granted if each not in saved]
        return saved, self.loaded()

    def loaded(self):
        over = []
        for request_id, load in list(self.loading.items()):
            load[1] -= 1
            if load[1] <= 0 and load[2].query():
                self.load(load[0])
                del self.loading[request_id]
                over.append(request_id)
        return over
