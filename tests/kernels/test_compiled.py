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
        assert kernels == {"_paged_kernel", "_runs_kernel", "_encode_kernel", "_decode_kernel"}


def test_bytes_move_in_the_widest_words_their_alignment_allows(binaries):
    copies = [binary for binary in binaries if "WORD" in binary]
    assert len(copies) == 4 * 5 * 5
    for binary in copies:
        moves = {a for a in binary["accesses"] if ".cg" in a or ".cs" in a}
        wide = WIDEST[binary["WORD"]]
        assert moves == {f"ld.global.cg{wide}", f"st.global.cs{wide}"}, binary


def test_nothing_spills_to_local_memory(binaries):
    for binary in binaries:
        assert not binary["has_local"], binary
        assert binary["stack"], "the assembler's report was not understood"
        assert not any(binary["stack"]), binary
