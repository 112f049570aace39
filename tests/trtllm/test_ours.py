"""Our connectors keep the contract, with every version, in-process and with a server."""

from __future__ import annotations

import importlib
import uuid

import pytest
from plug import Plug
from suite import ConnectorSuite, Version2Suite

OURS = "lmcache.integration.tensorrt_llm"


def destroy_engine():
    importlib.import_module(OURS).destroy_engine()


def settle():
    """What has landed is noted with the next pass, which may be long in coming."""
    for part in importlib.import_module("lmcache.adapters.trtllm.meeting").LIVE:
        joining = part._scheduler._joining if hasattr(part, "_scheduler") else None
        if joining and joining.current():
            joining.current().depart([], [])


ENVIRONMENT = {
    "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.05",
    "LMCACHE_CHUNK_SIZE": "64",
    "LMCACHE_SAVE_UNFULL_CHUNK": "False",
}


class InProcess:
    @pytest.fixture
    def plug(self, profile, monkeypatch):
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        return Plug(
            f"{OURS}.tensorrt_adapter",
            "LMCacheKvConnectorScheduler",
            "LMCacheKvConnectorWorker",
            preset="lmcache",
            ours=("lmcache",),
            settle=settle,
            close=destroy_engine,
        )


class WithServer:
    @pytest.fixture
    def plug(self, profile, monkeypatch, server):
        for name, value in {
            "LMCACHE_SERVER_URL": f"tcp://127.0.0.1:{server.port}",
            "LMCACHE_SAVE_UNFULL_CHUNK": "False",
            "LMCACHE_WEIGHT_GENERATION": uuid.uuid4().hex,  # nothing is stored yet
        }.items():
            monkeypatch.setenv(name, value)
        return Plug(
            f"{OURS}.tensorrt_mp_adapter",
            "LMCacheMPKvConnectorScheduler",
            "LMCacheMPKvConnectorWorker",
            preset="lmcache-mp",
            ours=("lmcache",),
            settle=server.wait_idle,
            close=destroy_engine,
        )


class TestInProcess(InProcess, ConnectorSuite):
    pass


class TestInProcessVersion2(InProcess, Version2Suite):
    pass


class TestWithServer(WithServer, ConnectorSuite):
    pass


class TestWithServerVersion2(WithServer, Version2Suite):
    pass
