"""Our connectors keep the contract, with every version, in-process and with a server."""

from __future__ import annotations

import pytest
from ours import in_process, with_server
from suite import ConnectorSuite, Version2Suite


class InProcess:
    @pytest.fixture
    def plug(self, profile, monkeypatch):
        return in_process(monkeypatch)


class WithServer:
    @pytest.fixture
    def plug(self, profile, monkeypatch, server):
        return with_server(monkeypatch, server)


class TestInProcess(InProcess, ConnectorSuite):
    pass


class TestInProcessVersion2(InProcess, Version2Suite):
    pass


class TestWithServer(WithServer, ConnectorSuite):
    pass


class TestWithServerVersion2(WithServer, Version2Suite):
    pass
