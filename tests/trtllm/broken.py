"""Connectors that are wrong in one way each, as real ones have been."""

from __future__ import annotations

import time

import minimal
import tensorrt_llm._utils
import torch
from fake_stream import FakeStream
from minimal import CHOICES, STORE, Job, Scheduler, Worker
from standin_api import Groups


class PromisesAll(Scheduler):
    def promise(self, request_id, state, length):
        return STORE.pin(request_id, self.keys(state)) * CHOICES.chunk


class PromisesHalfABlock(Scheduler):
    def promise(self, request_id, state, length):
        return max(0, super().promise(request_id, state, length) - self.bs // 2)


class PromisesNothingLater(Scheduler):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        super().get_num_new_matched_tokens(request, num_computed_tokens)
        return 0, True


class SavesThePrompt(Scheduler):
    """All of it in the first pass, whatever that computes."""

    def saves(self, data, state, position):
        data.num_scheduled_tokens = len(state.tokens)
        return super().saves(data, state, position)


class ForgetsLookups(Scheduler):
    def build_connector_meta(self, scheduler_output):
        meta = super().build_connector_meta(scheduler_output)
        for request_id in list(self.states):
            self.drop(request_id)
        return meta


class DoesNotPin(Scheduler):
    def promise(self, request_id, state, length):
        return min(STORE.hits(self.keys(state)) * CHOICES.chunk, (length - 1) // self.bs * self.bs)


class LooksAtRankZero(Scheduler):
    def promise(self, request_id, state, length):
        hits = STORE.hits(self.keys(state), [(0, 0)]) * CHOICES.chunk
        return min(hits, (length - 1) // self.bs * self.bs)


class TakesComingForAbsent(Scheduler):
    """It asks slower tiers, and does not wait for them."""

    @staticmethod
    def fetch(keys):
        STORE.fetch(keys)


class NeedsAnAddress(Scheduler):
    """Where no version before 1.3 has one."""

    def __init__(self, llm_args):
        super().__init__(llm_args)
        self.address = llm_args.kv_connector_config.server_url


class KeysByPath(Scheduler):
    """A model is what its folder is called on this host."""

    def __init__(self, llm_args):
        super().__init__(llm_args)
        self.identity_of = lambda request: (llm_args.model, *minimal.identity_of(request))


class LoadsFromTheStart(Scheduler):
    def load(self, request_id, state):
        chunks = range(-(-state.end // CHOICES.chunk))
        pieces = [self.piece(state, chunk, 0, state.end) for chunk in chunks]
        return Job(request_id, pieces, state.later)


class IgnoresIdentity(Scheduler):
    identity_of = staticmethod(lambda request: ())


class LoadsWhatIsNew(Scheduler):
    """And nothing that a report is still to come for."""

    def build_connector_meta(self, scheduler_output):
        self.waiting = []
        return super().build_connector_meta(scheduler_output)


class NeverForgets(Scheduler):
    def request_finished_by_layer_group(self, request, cache_block_ids_by_layer_group):
        self.seen = [*getattr(self, "seen", ()), {"request": str(request.request_id)}]
        return super().request_finished_by_layer_group(request, cache_block_ids_by_layer_group)


class KnowsOneGroup(Scheduler):
    """It has the flat methods only."""

    update_state_after_alloc_by_layer_group = Groups.update_state_after_alloc_by_layer_group
    request_finished_by_layer_group = Groups.request_finished_by_layer_group


class AsksItsRanks(Scheduler):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        tensorrt_llm._utils.mpi_allgather(len(self.states))
        return super().get_num_new_matched_tokens(request, num_computed_tokens)


class LooksBehindTheBinding(Scheduler):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        assert request.py_request_id == request.request_id
        return super().get_num_new_matched_tokens(request, num_computed_tokens)


class SendsEverything(Scheduler):
    def build_connector_meta(self, scheduler_output):
        self.all = [*getattr(self, "all", ()), *scheduler_output.new_requests]
        loads, saves = super().build_connector_meta(scheduler_output) or ([], [])
        return loads, saves, [list(data.new_tokens) for data in self.all]


class SendsAThread(Scheduler):
    def build_connector_meta(self, scheduler_output):
        return [], [], lambda: None


class TakesKeysAndValues(Worker):
    """For granted, as the configuration of a model has heads of both."""

    def register_kv_caches(self, kv_cache_tensor):
        super().register_kv_caches(kv_cache_tensor)
        self.groups = [[kv_cache_tensor[:, :, n].flatten(1) for n in range(2)]]


class ExportsItsPool(Worker):
    """To another process, as memory that torch has allocated."""

    def register_kv_caches(self, kv_cache_tensor):
        kv_cache_tensor.untyped_storage()._share_cuda_()

    def register_kv_cache_layout(self, layout):
        layout.groups[0].regions[0].as_tensor(torch.uint8).untyped_storage()._share_cuda_()


class LoadsAgain(Worker):
    """Whatever is bound, whether it is new or not."""

    def _clear_connector_meta(self):
        pass


class Hopes(Worker):
    """What is gone is not loaded, and that is all."""

    def load_piece(self, piece, number):
        if STORE.get((self.rank, number), piece.key) is not None:
            super().load_piece(piece, number)


class RaisesLate(Hopes):
    """It says that a load has failed when the pass has run."""

    def load_piece(self, piece, number):
        super().load_piece(piece, number)
        self.failed = STORE.get((self.rank, number), piece.key) is None

    def wait_for_save(self, stream):
        super().wait_for_save(stream)
        if getattr(self, "failed", False):
            raise RuntimeError("what was promised is gone")


class LoadsOnTheSide(Worker):
    """On a stream of its own that nobody waits for."""

    def load(self, job):
        if job.pieces:
            FakeStream().enqueue(lambda: super(LoadsOnTheSide, self).load(job))


class LoadsAtOnce(Worker):
    """While passes before are still at it."""

    def start_load_kv(self, stream):
        super().start_load_kv(FakeStream())


class LoadsOutsideAtOnce(Worker):
    """Likewise, for requests that are told of it later."""

    def start_load_kv(self, stream):
        loads, *_ = self.get_connector_meta() or ([], [])
        for job in loads:
            self.load(job)
        super().start_load_kv(stream)


class LoadsInHooks(Worker):
    def load(self, job):
        self.due = [*getattr(self, "due", ()), job]

    def wait_for_layer_load(self, layer_idx, stream):
        due, self.due = getattr(self, "due", ()), []
        for job in due:
            super().load(job)


class SavesAtOnce(Worker):
    """Before the pass has run."""

    def wait_for_save(self, stream):
        super().wait_for_save(FakeStream())


class HoldsUpItsPass(Worker):
    """Until it has run, though nobody has to wait for a save."""

    def wait_for_save(self, stream):
        stream.synchronize()
        super().wait_for_save(stream)


class ReportsUnasked(Worker):
    def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
        self.granted += {save[0].id for save in self.saving}.difference(self.granted)
        return super().get_finished(finished_gen_req_ids, started_loading_req_ids)


class ReportsTwice(Worker):
    def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
        saved, loaded = super().get_finished(finished_gen_req_ids, started_loading_req_ids)
        again, self.reported = getattr(self, "reported", []), list(saved)
        return saved + again, loaded


class NeverReports(Worker):
    def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
        super().get_finished(finished_gen_req_ids, started_loading_req_ids)
        return [], []


class ReportsLoadsAtOnce(Worker):
    def loaded(self):
        super().loaded()
        early = [i for i in self.loading if i not in getattr(self, "early", ())]
        self.early = [*getattr(self, "early", ()), *early]
        return early


class WaitsForSaves(Worker):
    def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
        time.sleep(0.1)
        return super().get_finished(finished_gen_req_ids, started_loading_req_ids)


class AnswersNone(Worker):
    def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
        super().get_finished(finished_gen_req_ids, started_loading_req_ids)


class WritesLate(Worker):
    """Into blocks that were somebody's."""

    def wait_for_save(self, stream):
        super().wait_for_save(stream)
        for job in minimal.CHOICES.stale:
            job()


class TalksAlone(Worker):
    """A collective on one rank."""

    def wait_for_save(self, stream):
        if self.rank == 0:
            tensorrt_llm._utils.mpi_broadcast(None)
        super().wait_for_save(stream)
