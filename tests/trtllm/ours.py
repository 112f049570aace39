"""Our connectors, as they are plugged in."""

from __future__ import annotations

import importlib
import uuid

from plug import Plug

from lmcache.core.mover import Mover

PACKAGE = "lmcache.integration.tensorrt_llm"


def destroy_engine():
    importlib.import_module(PACKAGE).destroy_engine()


def settle():
    """What has landed is noted with the next pass, which may be long in coming."""
    for part in importlib.import_module("lmcache.adapters.trtllm.meeting").LIVE:
        joining = part._scheduler._joining if hasattr(part, "_scheduler") else None
        if joining and joining.current():
            joining.current().depart([], [])


def fail_loads(monkeypatch, rank):
    """On one of the ranks nothing that was promised is there."""
    load = Mover.load

    def fails(mover, moves, *args):
        return (0, list(moves)) if mover._slice == rank else load(mover, moves, *args)

    monkeypatch.setattr(Mover, "load", fails)


def watch_reads(engine):
    """No block is read for a store that nobody has any more."""
    for rank in engine.ranks:
        stores = rank.manager.worker._worker._stores
        stores.add = _watched(engine, rank, stores.add)


def _watched(engine, rank, add):
    blocks, number = rank.memory.blocks[0], rank.memory.pools[0].rank

    def expect_held(copy):
        read = {block for move in copy.moves for block in move.engine_pages}
        freed = sorted(b for b in read if not blocks.holders[b] and b not in blocks.key_of)
        text = f"rank {number}, request {copy.request}: {freed} are nobody's"
        engine.judge.expect(not freed, "read", text)

    def watched(copy):
        make = copy.make

        def made():
            expect_held(copy)
            try:
                make()
            finally:
                expect_held(copy)

        copy.make = made
        add(copy)

    return watched


def _say(monkeypatch, settings):
    # some wait for it; a pass takes less even on a busy machine
    monkeypatch.setattr(importlib.import_module("lmcache.adapters.trtllm.stores"), "LOST_S", 2)
    for name, value in settings.items():
        monkeypatch.setenv(f"LMCACHE_{name}", value)


def in_process(monkeypatch, **settings):
    """Of the preset `lmcache`, configured by the environment."""
    ours = {"CHUNK_SIZE": "64", "MAX_LOCAL_CPU_SIZE": "0.05", "SAVE_UNFULL_CHUNK": "False"}
    _say(monkeypatch, {**ours, **settings})
    return Plug(
        f"{PACKAGE}.tensorrt_adapter",
        "LMCacheKvConnectorScheduler",
        "LMCacheKvConnectorWorker",
        preset="lmcache",
        ours=("lmcache",),
        saves_later=True,
        settle=settle,
        close=destroy_engine,
        attend=watch_reads,
    )


def with_server(monkeypatch, server, **choices):
    """Of the preset `lmcache-mp`; nothing of what the server has is theirs."""
    _say(
        monkeypatch,
        {
            "SERVER_URL": f"tcp://127.0.0.1:{server.port}",
            "SAVE_UNFULL_CHUNK": "False",
            "WEIGHT_GENERATION": uuid.uuid4().hex,
        },
    )
    about = {"settle": server.wait_idle, "close": destroy_engine, "ours": ("lmcache",)}
    about["attend"] = watch_reads
    return Plug(
        f"{PACKAGE}.tensorrt_mp_adapter",
        "LMCacheMPKvConnectorScheduler",
        "LMCacheMPKvConnectorWorker",
        preset="lmcache-mp",
        saves_later=True,
        **{**about, **choices},
    )
