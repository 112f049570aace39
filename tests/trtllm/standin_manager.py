"""The runtime's end of a connector on one rank: who is asked and told what, and the ids."""

from __future__ import annotations

import pickle


class KvCacheConnectorManager:
    """One rank's. Everything collective is called by all ranks in the same order."""

    def __init__(self, worker, scheduler, *, profile, communicator, watch, trace):
        assert (scheduler is not None) == (communicator.rank == 0)
        self.worker, self.scheduler = worker, scheduler
        self.profile, self.communicator = profile, communicator
        self.watch, self.judge, self.trace = watch, watch.judge, trace
        self.new = {"saving": {}, "loading": {}}
        self.pending = {"saving": {}, "loading": {}}
        self.local = {"saving": {}, "loading": {}}

    # --- what only the leader's scheduler answers

    def _ask_leader(self, what, method, *args):
        answer = self._lead(what, method, *args) if self.scheduler else None
        return self.communicator.broadcast(answer, what=what)

    def _lead(self, what, method, *args):
        with self.communicator.alone():
            return self.watch(what, getattr(self.scheduler, method), *args)

    def query(self, request, native, computed):
        """How many more tokens there are, and whether they come later."""
        answer = self._ask_leader("query", "get_num_new_matched_tokens", native, computed)
        self._check_offer(answer, request, computed)
        found, later = answer
        self.trace.add("query", request.id, computed, found, later)
        return found, later

    def _check_offer(self, answer, request, computed):
        judge, prompt = self.judge, len(request.tokens)
        good = type(answer) is tuple and [type(each) for each in answer] == [int, bool]
        judge.expect(good, "offer", f"the answer is {answer!r}")
        if good:
            found, later = answer
            end = computed + found
            whole = found == 0 or end % request.block_tokens == 0
            judge.expect(found >= 0, "offer", f"{found} tokens")
            judge.expect(found > 0 or not later, "offer", "nothing, but later")
            judge.expect(whole, "offer", f"it ends at {end}, within a block")
            judge.expect(
                end < prompt or not found,
                "at-least-one-uncomputed-token",
                f"{computed} + {found} of {prompt} tokens",
            )
        judge.settle()

    def update(self, request, view, groups):
        self.trace.add("update", request.id, *[list(blocks) for blocks in groups])
        if request.later:
            self.new["loading"][request.id] = request
        if not self.scheduler:
            return
        if self.profile.layouts:
            method, blocks = "update_state_after_alloc_by_layer_group", [list(g) for g in groups]
        else:
            method, [blocks] = "update_state_after_alloc", [list(g) for g in groups]
        self._lead("update", method, view, blocks)

    def cancel_load(self, request, view, start, end):
        self.trace.add("cancel_load", request.id, start, end)
        if self.scheduler:
            self._lead("cancel_load", "cancel_load", view, start, end)

    def reset(self, request, view):
        self.new["loading"].pop(request.id, None)
        self.trace.add("reset", request.id)
        if self.scheduler:
            self._lead("reset", "request_reset", view)

    def request_finished(self, request, view, groups):
        """Whether the blocks must stay until the request's save is reported."""
        blocks = [list(group) for group in groups]
        if self.profile.layouts:
            method, given = "request_finished_by_layer_group", blocks
        else:
            method, [given] = "request_finished", blocks
        answer = self._ask_leader("finished", method, view, given)
        self.judge.expect(type(answer) is bool, "answer", f"request_finished: {answer!r}")
        self.trace.add("finished", request.id, *blocks, answer)
        if answer:
            self.new["saving"][request.id] = request
        return answer

    # --- what every rank's worker does

    def start_batch(self, output, budget):
        """Tell everybody what is about to run."""
        meta = self._lead("meta", "build_connector_meta", output) if self.scheduler else None
        if self.scheduler:
            self._weigh(meta, budget)
        meta = self.communicator.broadcast(meta, what="meta")
        self.watch("bind", self.worker.bind_connector_meta, meta)

    def _weigh(self, meta, budget):
        try:
            size = len(pickle.dumps(meta))
        except Exception as error:
            self.judge.expect(False, "metadata", f"it cannot be pickled: {error!r}")
        else:
            self.judge.expect(size <= budget, "metadata", f"{size} bytes where {budget} are due")
        self.judge.settle()

    def start_load(self, stream):
        self.trace.add("load")
        self.watch("load", self.worker.start_load_kv, stream)

    def get_finished(self):
        """The requests whose saves, and those whose loads, are over on all ranks."""
        granted = {}
        for kind, fresh in self.new.items():
            granted[kind] = list(fresh)
            self.pending[kind].update(fresh)
            fresh.clear()
        answer = self.watch(
            "get_finished", self.worker.get_finished, granted["saving"], granted["loading"]
        )
        self._take(answer)
        self.trace.add("get_finished", granted["saving"], granted["loading"], *map(list, answer))
        mine = {kind: list(over) for kind, over in self.local.items()}
        everywhere = self.communicator.allgather(mine, what="get_finished")
        return self._effects("saving", everywhere), self._effects("loading", everywhere)

    def _take(self, answer):
        good = type(answer) is tuple and [type(each) for each in answer] == [list, list]
        self.judge.expect(good, "answer", f"get_finished: {answer!r}")
        self.judge.settle()
        for kind, ids in zip(("saving", "loading"), answer, strict=True):
            for each in ids:
                why = "twice" if each in self.local[kind] else "though it was not pending"
                known = each in self.pending[kind]
                self.judge.expect(known, "ids", f"{kind} {each} is reported {why}")
                if known:
                    self.local[kind][each] = self.pending[kind].pop(each)
        self.judge.settle()

    def _effects(self, kind, everywhere):
        over = sorted(set.intersection(*(set(ids[kind]) for ids in everywhere)))
        if kind == "saving" and self.profile.one_release:
            text = f"saving {over} end at once, and this version forgets all but one of them"
            self.judge.expect(len(over) < 2, "ids", text)
        return [self.local[kind].pop(each) for each in over]

    def in_flight(self, kind):
        """Ids whose end has not taken effect."""
        return [*self.new[kind], *self.pending[kind], *self.local[kind]]
