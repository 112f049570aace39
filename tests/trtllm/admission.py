"""Who runs next, what the connector is asked about those that begin, and the blocks they get."""

from __future__ import annotations

from standin_request import LlmRequestState
from workload import Pass


class Admission:
    """Scheduling and allocation of one rank."""

    def __init__(self, requests, profile, options, manager, memory):
        self.requests, self.profile, self.options = requests, profile, options
        self.manager, self.memory = manager, memory
        self.waiting = False
        """Whether a request was asked about and put off."""

    def batch(self):
        """The passes of this iteration."""
        self.waiting = False
        return self._prepare(self._choose())

    def _choose(self):
        """Decodes first, then prompts in the order they came, as far as the budget goes."""
        budget, chosen = self.options.max_num_tokens, []
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
            request.later &= request.found > 0 or self.options.waits_for_nothing
            if self.options.tells_of_less:
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
            request.state = LlmRequestState.DISAGG_GENERATION_TRANS_IN_PROGRESS

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
