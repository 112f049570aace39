"""The paths are measured once on each machine, and the fastest is taken."""

from __future__ import annotations

import json

import pytest
from lazy import LazyDevice

from lmcache.core.kernels import calibrate as module
from lmcache.core.kernels.calibrate import RUN_BYTES, Notebook, calibrate
from lmcache.core.kernels.paths import PATHS

TABLE = {"store": {2048: "staged", 65536: "direct"}, "load": {2048: "kernel"}}


@pytest.mark.parametrize("fastest", PATHS)
def test_the_fastest_is_taken(monkeypatch, fastest):
    """By a clock that goes slowly for one path."""
    monkeypatch.setattr(module, "TOTAL_BYTES", 1 << 18)
    now, devices = [0.0], []

    def make(planner):
        devices.append(LazyDevice(planner, 0))
        return devices[-1]

    class Pages(module.AcceleratorPages):
        def copy(self, spans, region, *, to_slab):
            path = self._paths.choose(1, to_slab=to_slab)
            best = fastest if to_slab else "direct"
            now[0] += 1.0 if path == best else 2.0
            return super().copy(spans, region, to_slab=to_slab)

    monkeypatch.setattr(module, "AcceleratorPages", Pages)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    table = calibrate(make)
    assert table["store"] == dict.fromkeys(RUN_BYTES, fastest)
    assert table["load"] == dict.fromkeys(RUN_BYTES, "direct")
    copied = sum(length for device in devices for _, _, length in device.copied)
    assert copied >= len(RUN_BYTES) * len(PATHS) * 2 * (1 << 18)


def test_what_was_measured_is_kept(tmp_path):
    notebook = Notebook(tmp_path / "new" / "folder")
    assert notebook.find("H200") is None
    notebook.keep("H200", TABLE)
    notebook.keep("A100", {**TABLE, "load": {1: "direct"}})
    again = Notebook(tmp_path / "new" / "folder")
    assert again.find("H200") == TABLE
    assert again.find("A100")["load"] == {1: "direct"}
    assert again.find("H100") is None
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        json.dumps({"H200": []}),
        json.dumps({"H200": {"store": {}, "load": {}}}),
        json.dumps({"H200": {"store": {"1": "direct"}}}),
        json.dumps({"H200": {"store": {"1": "by mail"}, "load": {"1": "direct"}}}),
        json.dumps({"H200": {"store": {"one": "direct"}, "load": {"1": "direct"}}}),
        json.dumps({"H200": {"store": {"1": ["direct"]}, "load": {"1": "direct"}}}),
        json.dumps({"H200": {"store": ["direct"], "load": {"1": "direct"}}}),
    ],
)
def test_a_damaged_notebook_is_no_notebook(tmp_path, text):
    (tmp_path / "copy-paths.json").write_text(text)
    notebook = Notebook(tmp_path)
    assert notebook.find("H200") is None
    notebook.keep("H200", TABLE)
    assert notebook.find("H200") == TABLE


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    notebook = Notebook(tmp_path / "file")
    notebook.keep("H200", TABLE)
    assert notebook.find("H200") is None


def test_the_users_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Notebook().keep("H200", TABLE)
    assert (tmp_path / "lmcache" / "copy-paths.json").exists()
