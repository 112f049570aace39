"""Run a script with a stand-in for TensorRT-LLM: `python standin_first.py SCRIPT`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import standin

with standin.installed("v1_3", afresh=()):
    runpy.run_path(sys.argv[1], run_name="__main__")
