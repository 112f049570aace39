"""The executor of one rank, an iteration at a time, in the order in which TensorRT-LLM does it."""

from __future__ import annotations

from admission import Admission
from fake_stream import FakeStream
from forward import Model
from judge import BatchFailed
from memory import Memory
from reports import Reporter, told
from standin_request import LlmRequestState as State
from workload import Request


class Executor:
    """Everything one rank knows. All ranks do the same in lockstep."""

    def __init__(self, profile, options, manager, api, hooks):
        self.profile, self.options, self.manager = profile, options, manager
        self.hooks = hooks
        self.stream = FakeStream("forward")
        compute = FakeStream("execution") if profile.execution_stream else self.stream
        self.memory = Memory(options, self.stream, manager.communicator.rank)
        self.model = Model(self.memory, manager, options, profile, (self.stream, compute))
        self.reporter = Reporter(profile, api, options)
        self.requests, self.cancels, self.resets = [], set(), set()
        self.admission = Admission(self.requests, profile, options, manager, self.memory)
        self.saving = {}
        """The blocks of ended requests whose saves are not over."""
        self.before = None
        """Under overlap, the batch whose tokens are still to be read."""

    # --- from outside, between iterations

    def add(self, wish):
        self.requests.append(Request.of(wish, self.options))
        return self.requests[-1]

    @property
    def is_idle(self):
        unread = self.before and any(not each.request.is_gone for each in self.before[0])
        flying = self.manager.in_flight("loading") + self.manager.in_flight("saving")
        return not (self.requests or unread or flying)

    def step(self):
        """One iteration."""
        flagged = self._pick_up()
        batch = self.admission.batch()
        self.hooks.prepared(self)
        ran, error = None, None
        if batch or self.manager.new["loading"] or self.admission.waiting:
            self._start(batch)
            ran, error = self._forward(batch)
        for request in self._read(ran, error):
            tells = request.error is None or self.profile.finishes_at_termination
            self._terminate(request, tells=tells)
        for request in flagged:
            self._cancel(request)
        self._get_finished()
        self.manager.judge.settle()

    # --- 1: who has been given up; 2 and 3 are in `admission.py`

    def _pick_up(self):
        """The cancelled ones that have begun; the others were never there."""
        by_id = {request.id: request for request in self.requests}
        flagged = [by_id[each] for each in self.cancels if each in by_id]
        resets = [by_id[each] for each in self.resets if each in by_id]
        self.cancels, self.resets = set(), set()
        for request in flagged:
            request.is_cancelled = True
            if not request.is_asked:
                self._drop(request)
        for request in resets:
            self._reset(request)
        return [request for request in flagged if not request.is_gone]

    def _reset(self, request):
        self.manager.reset(request, request.python(self.profile.salt))
        self.memory.let_go(request)
        request.restart()

    # --- 4 to 6: it runs

    def _start(self, batch):
        output = self.reporter.output(batch)
        new, cached = (
            [told(d) for d in ds] for ds in (output.new_requests, output.cached_requests)
        )
        self.manager.trace.add("meta", new, cached)
        self.manager.start_batch(output, self._budget(output))
        veiled = self._only_to_read(batch)
        self.stream.enqueue(lambda: self.memory.pools[0].veil(veiled))
        self.manager.start_load(self.stream)
        self.stream.enqueue(lambda: self.memory.pools[0].veil(veiled))

    def _only_to_read(self, batch):
        """Blocks found on the device for requests that load others; no save may be reading them."""
        loading = [each.request for each in batch if each.loaded]
        found = {
            block
            for request in loading
            for block in request.tables[0][: request.matched // self.options.bs]
        }
        others = [each.tables for each in self.requests if each not in loading]
        read = {block for tables in (*others, *self.saving.values()) for block in tables[0]}
        return sorted(found - read)

    def _budget(self, output):
        """Bytes of metadata that a batch may need: it grows with what is new."""
        parked = [request for request in self.requests if request.is_loading]
        fresh = sum(len(request.tokens) for request in parked)
        for each in (*output.new_requests, *output.cached_requests):
            fresh += 4 + len(each.new_tokens) + len(each.new_block_ids) + each.num_scheduled_tokens
        return 2048 + 64 * fresh

    def _forward(self, batch):
        if not batch:
            return None, None
        try:
            event = self.model.run(batch)
        except BatchFailed as error:
            return None, error
        for each in batch:
            if each.is_context and not each.request.is_context and self.options.reuse:
                self.memory.learn(each.request, len(each.request.prompt))
        return (batch, event), None

    # --- 7 to 10: what came of it

    def _read(self, ran, error):
        """Read the tokens of a batch; those that have ended."""
        if error is not None:
            self.before = None
            self.stream.synchronize()  # the pass has run all the same
            failed = [request for request in self.requests if request.is_active]
            for request in failed:
                request.error = str(error)
            return failed
        if self.options.overlap:
            ran, self.before = self.before, ran
        if ran is None:
            return []
        batch, event = ran
        event.synchronize()
        self.manager.judge.settle()
        return [each.request for each in batch if each.speaks and self._hear(each.request)]

    @staticmethod
    def _hear(request):
        if request.is_gone or request.is_finished:
            return False
        request.listen()
        return request.is_finished

    def _cancel(self, request):
        if request.is_gone:
            return
        if request.is_loading and self.profile.drains_loads:
            return  # its blocks are being written to
        request.error = request.error or "cancelled"
        self._terminate(request, tells=self.profile.tells_of_cancels)

    def _terminate(self, request, *, tells):
        saves = tells and self.manager.request_finished(
            request, request.python(self.profile.salt), request.tables
        )
        if request.error is None and self.options.reuse:
            self.memory.learn(request, len(request.tokens) - 1)
        if saves and (self.options.reuse or self.profile.layouts):
            self._keep(request)
        request.state = (
            State.DISAGG_CONTEXT_TRANS_IN_PROGRESS if saves else State.GENERATION_COMPLETE
        )
        self._drop(request)

    def _keep(self, request):
        """Version 2 keeps a request's blocks, version 1 what is known to be the same."""
        if request.is_cancelled and not self.profile.layouts:
            self.memory.learn(request, min(request.position, len(request.tokens) - 1))
        kept = request.tables if self.profile.layouts else self.memory.known(request)
        self.memory.hold(kept)
        self.saving[request.id] = [list(table) for table in kept]

    def _drop(self, request):
        request.is_gone = True
        self.memory.let_go(request)
        self.requests.remove(request)
        # what was freed is somebody else's at once; what is ordered too late shows
        self.stream.synchronize()

    def _get_finished(self):
        self.hooks.polling(self)
        saved, loaded = self.manager.get_finished()
        for request in loaded:
            self._loaded(request)
        for request in saved:
            self.memory.release(self.saving.pop(request.id, []))
        if saved:
            self.stream.synchronize()

    def _loaded(self, request):
        if request.is_gone:
            return
        request.state, request.is_loaded = State.CONTEXT_INIT, True
        if request.is_cancelled:
            self._cancel(request)
