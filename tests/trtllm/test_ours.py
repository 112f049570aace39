"""Our connectors keep the contract, with every version, in-process and with a server."""

from __future__ import annotations

import logging

import pytest
from driver import Engine
from ours import in_process, with_server
from suite import ConnectorSuite, DescribedSuite, ExactSuite, OutsideSuite, Version2Suite


@pytest.fixture(autouse=True)
def no_error_is_hidden(heard):
    """Whatever was swallowed, so that the engine goes on, is in the log."""
    yield
    assert not [r.getMessage() for r in heard.get_records("call") if r.levelno >= logging.ERROR]


class InProcess:
    @pytest.fixture
    def plug(self, profile, monkeypatch):
        return in_process(monkeypatch)


class WithServer:
    @pytest.fixture
    def plug(self, profile, monkeypatch, server):
        return with_server(monkeypatch, server)


class TwoRanks:
    """Each with its own blocks and its own share; what a test does to one of them is left out."""

    test_a_batch_that_fails_is_all_that_fails = None
    test_a_pass_that_breaks_off_stores_nothing = None
    test_a_request_that_nobody_knows_is_ignored = None

    @pytest.fixture
    def start(self, profile, plug):
        return lambda **options: Engine(profile, plug, **{"ranks": 2, "layers": 1, **options})


class TestInProcess(InProcess, ConnectorSuite):
    pass


class TestInProcessExactly(InProcess, ExactSuite):
    pass


class TestWithServerExactly(WithServer, ExactSuite):
    pass


class TestInProcessDescribed(InProcess, DescribedSuite):
    pass


class TestWithServerDescribed(WithServer, DescribedSuite):
    pass


class TestInProcessVersion2(InProcess, Version2Suite):
    pass


class TestWithServer(WithServer, ConnectorSuite):
    pass


class TestWithServerOutside(WithServer, OutsideSuite):
    pass


class TestWithServerVersion2(WithServer, Version2Suite):
    pass


class TestInProcessTwoRanks(TwoRanks, InProcess, ConnectorSuite):
    pass


class TestInProcessVersion2TwoRanks(TwoRanks, InProcess, Version2Suite):
    pass


class TestWithServerTwoRanks(TwoRanks, WithServer, ConnectorSuite):
    pass


class TestWithServerVersion2TwoRanks(TwoRanks, WithServer, Version2Suite):
    pass
