"""An engine of one or more ranks with a connector plugged in.

    with Engine(profile, Plug("minimal"), chunked=True, max_num_tokens=128) as engine:
        engine.submit(prompt(256), new_tokens=3)
        engine.run()

Whatever a connector does against the contract ends the run with a `Violation` that names the rule.
"""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import standin_comm
import standin_creator
import standin_layout
from executor import Executor
from judge import ExecutorDied, Judge, Violation, Watch
from plug import mentions
from standin_manager import KvCacheConnectorManager
from workload import Options, Trace, Wish

POLL_S = 0.001


def prompt(length, seed=0):
    """Tokens that share no block with those of other seeds."""
    return tuple((seed * 1_000_003 + 17 * i + 1) % 50_000 for i in range(length))


class Crew:
    """A thread for each rank, or none where there is one rank."""

    def __init__(self, communicators, world):
        self.communicators, self.world = communicators, world
        self.pools = [ThreadPoolExecutor(1, f"trt-rank-{c.rank}") for c in communicators]

    def each(self, work):
        """What `work(rank)` returns on each rank. The leader's trouble is raised first."""
        if len(self.communicators) == 1:
            return [self._run(self.communicators[0], work)]
        futures = [
            pool.submit(self._run, communicator, work)
            for pool, communicator in zip(self.pools, self.communicators, strict=True)
        ]
        errors = [error for error in (future.exception() for future in futures) if error]
        if errors:
            raise min(errors, key=self._remoteness)
        return [future.result() for future in futures]

    @staticmethod
    def _remoteness(error):
        """How far an error is from what went wrong."""
        kinds = (Violation, ExecutorDied, standin_comm.OutOfStep)
        if isinstance(error.__cause__, standin_comm.OutOfStep):
            return len(kinds)
        return next((at for at, kind in enumerate(kinds) if isinstance(error, kind)), 1)

    def _run(self, communicator, work):
        with standin_comm.bound(communicator):
            try:
                return work(communicator.rank)
            except BaseException:
                self.world.leave()
                raise

    def close(self):
        for pool in self.pools:
            pool.shutdown()


class Engine:
    """Ranks in lockstep, driven by a test."""

    def __init__(self, profile, plug, *, args=None, **options):
        self.profile, self.plug = profile, plug
        self.options = Options(saves_later=plug.saves_later, **options)
        self.judge = Judge()
        self.ids = itertools.count(7_000_001, 7919)
        self.wishes, self.requests = [], []
        self.is_abandoned = False
        self.silent_ids = set()
        """Requests of whose end no connector is told."""
        self.hooks = SimpleNamespace(prepared=lambda executor: None, polling=lambda executor: None)
        self.args = self._args(args or {})
        self._bring_up()
        plug.attend(self)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, where):
        with ExitStack() as stack:
            stack.callback(self.plug.close)
            stack.callback(self.crew.close)
            if kind is None and not self.is_abandoned:
                self.finish()

    def abandon(self):
        """It was stopped on the way: nothing is expected of it."""
        self.is_abandoned = True

    # --- bring-up

    def _args(self, changes):
        api = sys.modules["tensorrt_llm.llmapi.llm_args"]
        options = self.options
        cache = api.KvCacheConfig(
            enable_block_reuse=options.reuse,
            enable_partial_reuse=options.partial,
            tokens_per_block=options.bs,
            use_kv_cache_manager_v2=self.profile.layouts,
        )
        chosen = {
            "model": "tiny",
            "tensor_parallel_size": options.ranks,
            "kv_cache_config": cache,
            "kv_connector_config": self.plug.config(self.profile),
            "disable_overlap_scheduler": not options.overlap,
            "enable_chunked_prefill": options.chunked,
            "max_num_tokens": options.max_num_tokens,
        }
        return api.TorchLlmArgs(**{**chosen, **changes})

    def _bring_up(self):
        world = standin_comm.World(self.options.ranks, self.judge, self.options.patience_s)
        communicators = [standin_comm.Communicator(n, world) for n in range(self.options.ranks)]
        self.crew = Crew(communicators, world)
        try:
            self.ranks = self.crew.each(lambda rank: self._executor(communicators[rank]))
            self.crew.each(self._hand_over_pools)
        except BaseException:
            self.crew.close()
            raise
        self.judge.settle()

    def _executor(self, communicator):
        worker, scheduler = standin_creator.create(self.profile, self.args, communicator)
        manager = KvCacheConnectorManager(
            worker,
            scheduler,
            profile=self.profile,
            communicator=communicator,
            watch=Watch(self.judge, communicator.rank, self.options.limit_s),
            trace=Trace(),
        )
        api = sys.modules[self.profile.path]
        executor = Executor(self.profile, self.options, manager, api, self.hooks)
        executor.model.bring_up(worker)
        return executor

    def _hand_over_pools(self, rank):
        executor = self.ranks[rank]
        manager, pools = executor.manager, executor.memory.pools
        if self.profile.layouts or self.options.described:
            register, handed = manager.worker.register_kv_cache_layout, self._layout(pools)
        else:
            register, handed = manager.worker.register_kv_caches, pools[0].tensor()
        manager.watch("register", register, handed)
        executor.model.warm_up()
        manager.trace.clear()
        if manager.scheduler and self.profile.waits_for_start:
            manager.watch("register", manager.scheduler.wait_for_initialization)

    def _layout(self, pools):
        groups = [
            pool.group(number, window)
            for number, (pool, window) in enumerate(zip(pools, self.options.windows, strict=True))
        ]
        single = pools[0].tensor() if len(pools) == 1 and not pools[0].split else None
        return standin_layout.KvCacheLayout(
            self.options.bs, self.options.dtype, tuple(groups), single
        )

    # --- what a test does

    @property
    def trace(self):
        """The leader's calls."""
        return self.ranks[0].manager.trace

    @property
    def leader(self):
        return self.ranks[0].manager.scheduler

    def submit(self, tokens, **wish):
        """Ask for something; what the leader knows of it."""
        assert self.profile.salt or wish.get("salt") is None, "this version has no salt"
        made = Wish(id=next(self.ids), prompt=tuple(tokens), **wish)
        self.wishes.append(made)
        request, *_ = [executor.add(made) for executor in self.ranks]
        self.requests.append(request)
        return request

    def cancel(self, request):
        for executor in self.ranks:
            executor.cancels.add(request.id)
        if not self.profile.tells_of_cancels:
            self.silent_ids.add(request.id)

    def reset(self, request):
        for executor in self.ranks:
            executor.resets.add(request.id)

    def step(self, count=1):
        for _ in range(count):
            try:
                self.crew.each(lambda rank: self.ranks[rank].step())
            except (ExecutorDied, standin_comm.OutOfStep):
                self.judge.settle()
                raise

    def step_until(self, is_over, limit=100_000):
        """Iterate until `is_over()`; that it never is, is a fault."""
        while not is_over():
            limit -= 1
            assert limit, "it never came"
            self.step()

    def dummy_pass(self):
        """A forward of padding on all ranks."""
        self.crew.each(lambda rank: self.ranks[rank].model.run_dummy())

    def run(self, limit=200):
        """Until nothing is left to do."""
        for _ in range(limit):
            if all(executor.is_idle for executor in self.ranks):
                self.plug.settle()
                return self
            if not any(executor.requests for executor in self.ranks):
                time.sleep(POLL_S)  # as an executor does that only waits for copies
            self.step()
        self.judge.expect(False, "stuck", f"something is left after {limit} iterations")
        self.judge.settle()
        return self

    def clear(self):
        """Begin the traces anew."""
        for executor in self.ranks:
            executor.manager.trace.clear()

    def forget(self):
        """Free what the engine only keeps for reuse."""
        for executor in self.ranks:
            executor.memory.forget()

    def audit(self, last=0):
        """Ask again for everything, from a connector that must have it right or not at all.

        Or for what was asked `last`.
        """
        asked = list(zip(self.wishes, self.requests, strict=True))[-last:]
        for wish, request in asked:
            for tokens in {wish.prompt, tuple(request.tokens)}:
                self.forget()
                about = {"salt": wish.salt, "lora": wish.lora, "media": wish.media}
                self.submit(tokens, **about)
                self.run()
        self.forget()
        return self

    def finish(self, bound=16):
        """Nothing may be left of what there was."""
        self.run()
        self.submit(prompt(5, seed=41))  # what is to be said with the next pass is said
        self.run()
        for executor in self.ranks:
            executor.stream.synchronize()
            for group, pool in enumerate(executor.memory.pools):
                strange = pool.strange()
                self.judge.expect(not strange, "write", f"group {group}: blocks {strange}")
            held = [blocks.holders for blocks in executor.memory.blocks]
            assert not any(map(any, held)), "the executor lost blocks"
            self._expect_forgotten(executor.manager, bound)
        self._expect_lockstep()
        self.judge.settle()

    def _expect_forgotten(self, manager, bound):
        silent = self.silent_ids | {r.id for r in self.requests if r.error}
        for part in (manager.worker, manager.scheduler):
            told = {wish.id for wish in self.wishes} - silent
            left = mentions(part, told, self.plug.ours)
            self.judge.expect(not left, "leftover", f"{left[:4]}")
            known = {path.split()[-1] for path in mentions(part, silent, self.plug.ours)}
            self.judge.expect(len(known) <= bound, "leftover", f"{len(known)} silent requests")

    def _expect_lockstep(self):
        first, *others = [e.manager.trace.without("get_finished") for e in self.ranks]
        assert all(calls == first for calls in others), "ranks are not in lockstep"
