"""The kernels with the Triton that the oldest vLLMs in use bring along."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OLDER = HERE.parents[1] / ".triton"
OF_ITS_INTERPRETER = "ignore:Conversion of an array:DeprecationWarning"


def test_kernels_do_the_same_with_an_older_triton():
    """In a process of its own, as no process has two."""
    if not (OLDER / "triton").exists():
        pytest.skip("an older Triton is not installed, see scripts/setup.sh")
    tests = sorted(each for each in HERE.glob("test_*.py") if each != Path(__file__))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)]
    done = subprocess.run(
        [*command, "-W", OF_ITS_INTERPRETER],
        env={**os.environ, "PYTHONPATH": str(OLDER)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"\d{3,} passed", done.stdout)
