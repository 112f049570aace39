"""The minimal connector keeps the contract, with every version."""

from __future__ import annotations

import sys

import pytest

from driver import Engine, prompt
from judge import ExecutorDied
from plug import Plug
from suite import ConnectorSuite, queries, reports


@pytest.fixture
def plug(profile):
    return Plug("minimal")


class TestMinimal(ConnectorSuite):
    pass
