"""The kernels as Triton's interpreter runs them: on a CPU, with NumPy."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# tests belong to no package, so there is no name to import their helpers by
for name in ("pools", "lazy"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

NAMES = ("words", "guard", "paged", "scattered", "fp8")


@pytest.fixture(scope="session")
def interpreted():
    """Modules of their own: those that are imported elsewhere are compiled for a device."""
    pytest.importorskip("triton", reason="needs Triton")
    paths = [f"lmcache.core.kernels.{name}" for name in NAMES]
    kept = {path: sys.modules.pop(path) for path in paths if path in sys.modules}
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        found = [importlib.import_module(path) for path in paths]
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        for path in paths:
            sys.modules.pop(path, None)
        sys.modules.update(kept)
    return SimpleNamespace(**dict(zip(NAMES, found, strict=True)))
