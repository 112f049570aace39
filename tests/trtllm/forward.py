"""One forward pass: everything below it is looked at, then its own positions are written."""

from __future__ import annotations

import threading


class Model:
    """The layers of one rank."""

    def __init__(self, memory, manager, options, profile, streams):
        self.memory, self.manager = memory, manager
        self.options, self.profile = options, profile
        self.stream, self.compute = streams
        self.callable = None

    def bring_up(self, worker):
        """What is asked before there are pools, and what is told then."""
        if self.profile.cuda_graphs:
            watch = self.manager.watch
            self.callable = watch("forward", worker.register_forward_pass_callable) or None

    def run(self, batch):
        """Launch a batch, let the connector save, and say when it is over."""
        try:
            self._launch(batch)
        finally:
            if self.compute is not self.stream:
                self.stream.wait_stream(self.compute)
        self.manager.trace.add("save")
        self._save()
        return self.stream.record_event()

    def _save(self):
        self.stream.owner, self.stream.waited_for = threading.get_ident(), False
        self.manager.watch("save", self.manager.worker.wait_for_save, self.stream)
        if self.options.saves_later:
            self.manager.judge.expect(
                not self.stream.waited_for, "blocked", "a save waits for its pass"
            )

    def warm_up(self):
        """A pass before there are requests: hooks are called, and nothing is bound."""
        for layer in range(self.options.layers):
            self._hook("wait_for_layer_load", layer)
            self._hook("save_kv_layer", layer)
        if self.callable:
            self.manager.watch("callable", self.callable)

    def run_dummy(self):
        """A pass about no request, of which a connector is not told: what was bound stays so."""
        self.manager.start_load(self.stream)
        self.warm_up()
        self._save()

    def _launch(self, batch):
        if self.compute is not self.stream:
            self.compute.wait_stream(self.stream)
        self._prepare(batch)
        may_load = set(self.memory.open)
        for layer in range(self.options.layers):
            self._hook("wait_for_layer_load", layer)
            if layer == 0:
                self.compute.enqueue(lambda: self._work(batch, may_load))
            self._hook("save_kv_layer", layer)
        for each in batch:
            for group, blocks in enumerate(each.loaded):
                self.memory.open -= {(group, block) for block in blocks}
        if self.callable:
            self.manager.watch("callable", self.callable)

    def _hook(self, method, layer):
        if not (self.options.graphs and self.profile.cuda_graphs):
            self.manager.trace.add("hook", method, layer)
            worker = self.manager.worker
            self.manager.watch("hook", getattr(worker, method), layer, self.compute)

    def _prepare(self, batch):
        """Fix what the pass is about: it runs later, when lists have changed."""
        for each in batch:
            request = each.request
            each.start = request.position if each.is_context else len(request.ahead) - 1
            each.tables = [list(table) for table in request.tables]
            each.digests = request.digests()
            request.position = each.start + each.count
            each.speaks = request.position >= len(request.ahead)
            if each.speaks:
                request.say(each.digests)

    def _work(self, batch, may_load):
        for group, pool in enumerate(self.memory.pools):
            allowed = {block for at, block in may_load if at == group}
            self._expect_untouched(pool, group, allowed)
            for each in batch:
                if not each.request.is_gone:
                    self._look(pool, group, each)
                if each.loaded:
                    pool.accept(each.loaded[group])
                places = range(each.start, each.start + each.count)
                pool.write(each.digests, list(places), each.tables[group])

    def _expect_untouched(self, pool, group, allowed):
        strange = pool.strange(allowed)
        text = f"rank {pool.rank}, group {group}: blocks {strange} are nobody's to load into"
        self.manager.judge.expect(not strange, "write", text)

    def _look(self, pool, group, each):
        places = list(range(self.memory.first_needed(group, each.start), each.start))
        wrong = pool.wrong(each.digests, places, each.tables[group])
        what = "the promised" if each.loaded else "the computed"
        text = (
            f"rank {pool.rank}, group {group}, request {each.request.id}: {what} positions"
            f" {wrong[:3]}... of {each.start} are wrong"
        )
        self.manager.judge.expect(not wrong, "content", text)
