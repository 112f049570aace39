"""Helpers of the tests of backends, and examples that may take as long as the disk does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import hypothesis

# tests belong to no package, so there is no name to import their helpers by
spec = importlib.util.spec_from_file_location("disk_rig", Path(__file__).with_name("disk_rig.py"))
disk_rig = sys.modules["disk_rig"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(disk_rig)

hypothesis.settings.register_profile("backends", deadline=None)
hypothesis.settings.load_profile("backends")
