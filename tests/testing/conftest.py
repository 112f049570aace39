"""Backends that break the rules, for the tests of the rules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# tests belong to no package, so there is no name to import their helpers by
for name in ("broken_backends", "broken_folders"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
