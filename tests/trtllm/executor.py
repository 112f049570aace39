"""The executor of one rank, an iteration at a time, in the order in which TensorRT-LLM does it."""

from __future__ import annotations

from fake_stream import FakeStream
from forward import Model
from judge import BatchFailed
from memory import Memory
from reports import Reporter, told
from standin_request import LlmRequestState
from workload import Pass, Request

LOADING = LlmRequestState.DISAGG_GENERATION_TRANS_IN_PROGRESS
SAVING = LlmRequestState.DISAGG_CONTEXT_TRANS_IN_PROGRESS


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
        self.saving = {}
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
        batch = self._prepare(self._schedule())
        ran, error = None, None
        if batch or self.manager.new["loading"] or self.waiting:
            batch = self._start(batch)
            ran, error = self._forward(batch)
        ended = self._read(ran, error)
        self._end(ended, flagged)
        for request in flagged:
            self._cancel(request)
        self._get_finished()
        self.manager.judge.settle()

    # --- 1 to 3: who runs

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

    def _schedule(self):
        """Decodes first, then prompts in the order they came, as far as the budget goes."""
        budget, chosen, self.waiting = self.options.max_num_tokens, [], False
        active = [request for request in self.requests if request.is_active]
        for request in active:
            if not request.is_context and self._may_speak(request) and budget:
                budget -= 1
                chosen.append(Pass(request, 1, first=False, is_context=False))
        for request in [each for each in active if each.is_context]:
            rest = len(request.ahead) - request.position
            count = min(rest, budget) if self.options.chunked else rest
            too_small = count < rest and count < self.options.bs
            if count > budget or too_small or not self._has_room(request):
                break
            budget -= count
            first = not request.is_reported
            chosen.append(Pass(request, count, first=first, is_context=True))
            request.is_admitted = True
        return chosen

    def _may_speak(self, request):
        unread = len(request.ahead) - len(request.prompt)
        return self.profile.surplus_forward or unread < request.new_tokens

    def _has_room(self, request):
        others = [each for each in self.requests if each.is_admitted and each is not request]
        return request.is_admitted or self.memory.fits(request, others)

    def _prepare(self, chosen):
        """Ask the connector about those that begin, and give everybody blocks."""
        fresh = [each for each in chosen if each.first and not each.request.is_loaded]
        kept = [each for each in chosen if each not in fresh]
        groups = [fresh] if self.profile.asks_in_batches else [[each] for each in fresh]
        for group in groups:
            for each in group:
                self._ask(each.request)
            for each in group:
                if self._is_due(each.request):
                    self._admit(each)
                    kept.append(each)
        for each in kept:
            self._extend(each)
        self.hooks.prepared(self)
        return [each for each in chosen if each in kept and not each.request.is_parked]

    def _ask(self, request):
        if request.is_asked:
            return
        request.is_asked = True
        self.memory.match(request)
        # a request without reuse never gets there in version 1
        request.found, request.later = 0, False
        if self.options.reuse:
            native = request.native(self.profile.salt)
            answer = self.manager.query(request, native, request.matched)
            request.found, request.later = answer

    def _is_due(self, request):
        if request.waits and self.profile.layouts:
            request.waits -= 1
            self.waiting = True
            return False
        return True

    def _admit(self, each):
        request, python = each.request, each.request.python(self.profile.salt)
        if request.use is not None and request.use < request.found:
            start, end = (request.matched + more for more in (request.use, request.found))
            request.found = request.use
            self.manager.cancel_load(request, python, start, end)
        request.position = request.matched + request.found
        self._shrink(each)
        end = request.position + (0 if request.later else each.count)
        if not self.profile.layouts:
            end = len(request.ahead)
        self.memory.allocate(request, end, request.position)
        each.loaded = self._promised(request)
        blocks = {(group, b) for group, table in enumerate(each.loaded) for b in table}
        self.memory.open |= blocks
        self.manager.update(request, python, request.tables)
        if request.later:
            request.state = LOADING

    def _shrink(self, each):
        """A chunk that does not end the prompt ends a block."""
        request = each.request
        rest = len(request.ahead) - request.position
        each.count = min(each.count, rest)
        if each.count < rest:
            end = (request.position + each.count) // self.options.bs * self.options.bs
            each.count = end - request.position

    def _promised(self, request):
        if not request.found:
            return []
        first, last = request.matched // self.options.bs, request.position // self.options.bs
        return [[b for b in table[first:last] if b >= 0] for table in request.tables]

    def _extend(self, each):
        request = each.request
        if request.is_parked:
            return
        if each.is_context:
            if not each.first or request.is_loaded:
                self._shrink(each)
            end = request.position + each.count
        else:
            end = len(request.ahead)
        if each.first and request.is_loaded:
            each.loaded = self._promised(request)
        self.memory.slide(request)
        self.memory.allocate(request, end, request.position)

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
        return batch

    def _only_to_read(self, batch):
        """Blocks found on the device for requests that load others; no save may be reading them."""
        found = {
            block
            for each in batch
            if each.loaded
            for block in each.request.tables[0][: each.request.matched // self.options.bs]
        }
        read = {block for tables in self.saving.values() for block in tables[0]}
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

    def _end(self, ended, flagged):
        for request in ended:
            tells = request.error is None or self.profile.finishes_at_termination
            self._terminate(request, tells=tells)

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
            self.memory.hold(request.tables)
            self.saving[request.id] = [list(table) for table in request.tables]
        request.state = SAVING if saves else LlmRequestState.GENERATION_COMPLETE
        self._drop(request)

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
        request.state, request.is_loaded = LlmRequestState.CONTEXT_INIT, True
        if request.is_cancelled:
            self._cancel(request)
