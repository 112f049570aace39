"""Every kernel compiles for every GPU we name, with wide accesses and nothing in local memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("compiled.py")
KERNELS = {"_paged_kernel", "_runs_kernel", "_encode_kernel", "_decode_kernel", "shut_kernel"}
WIDEST = {16: ".v2.b64", 8: ".b64", 4: ".b32", 2: ".b16", 1: ".b8"}


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    said = subprocess.run(
        [sys.executable, SCRIPT], env=environment, stdout=subprocess.PIPE, check=True, timeout=300
    )
    return json.loads(said.stdout)


def test_every_kernel_is_compiled_for_every_gpu(binaries):
    assert all(binary["cubin_bytes"] for binary in binaries)
    for capability in (80, 89, 90, 100):
        kernels = {b["kernel"] for b in binaries if b["capability"] == capability}
        assert kernels == KERNELS


def test_bytes_move_in_the_widest_words_their_alignment_allows(binaries):
    copies = [binary for binary in binaries if "WORD" in binary]
    assert len(copies) == 4 * 5 * 7
    for binary in copies:
        moves = {a for a in binary["accesses"] if ".cg" in a or ".cs" in a}
        wide = WIDEST[binary["WORD"]]
        assert moves == {f"ld.global.cg{wide}", f"st.global.cs{wide}"}, binary


def test_nothing_spills_to_local_memory(binaries):
    for binary in binaries:
        assert not binary["has_local"], binary
        assert binary["stack"], "the assembler's report was not understood"
        assert not any(binary["stack"]), binary


def test_a_guard_is_passed_before_the_first_byte_and_left_after_the_last(binaries):
    guarded = [binary for binary in binaries if binary.get("GUARDED")]
    assert len(guarded) == 4 * 5 * 2
    for binary in guarded:
        order = binary["order"]
        entered, *others, met, left = [step for step in order if not step.startswith("st.")]
        assert "sys.acquire" in entered, order
        assert met.startswith("bar.sync"), "one thread speaks for all: they must have met"
        assert "sys.release" in left, order
        assert all(step.startswith("bar.sync") for step in others), order
        assert order[0] == entered
        assert order[-2:] == [met, left]
    for binary in binaries:
        if binary["kernel"] == "_paged_kernel" and not binary["GUARDED"]:
            assert not any(step.startswith(("atom", "red")) for step in binary["order"])
