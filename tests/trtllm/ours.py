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
    return Plug(
        f"{PACKAGE}.tensorrt_mp_adapter",
        "LMCacheMPKvConnectorScheduler",
        "LMCacheMPKvConnectorWorker",
        preset="lmcache-mp",
        saves_later=True,
        **{**about, **choices},
    )
