"""The connector under test, by name, as TensorRT-LLM is told about it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


def _nothing(*_):
    pass


@dataclass(frozen=True)
class Plug:
    """A module and two classes, or a preset where there are any."""

    module: str
    scheduler: str = "Scheduler"
    worker: str = "Worker"
    preset: str | None = None
    ours: tuple[str, ...] = ("minimal", "broken")
    """Beginnings of the modules whose objects are searched for what was forgotten in them."""

    saves_later: bool = False
    """Whether it promises that no save holds up a pass."""
    settle: Callable[[], None] = _nothing
    """Wait until what was saved can be found; called whenever an engine has nothing left to do."""
    close: Callable[[], None] = _nothing
    """Called when an engine has ended."""
    attend: Callable[[object], None] = _nothing
    """Called with each engine that has pools, to watch what it cannot see itself."""

    def config(self, profile):
        config_class = sys.modules["tensorrt_llm.llmapi.llm_args"].KvCacheConnectorConfig
        if self.preset in profile.presets:
            return config_class(connector=self.preset)
        return config_class(
            connector_module=self.module,
            connector_scheduler_class=self.scheduler,
            connector_worker_class=self.worker,
        )


def mentions(root, ids, ours):
    """Where objects of some modules still know an id, as a number or as text."""
    wanted = {*ids, *map(str, ids)}
    found, seen, left = [], set(), deque([(root, type(root).__name__)])
    while left:
        each, path = left.popleft()
        if isinstance(each, int | str):
            if each in wanted:
                found.append(f"{path} {each}")
        elif id(each) not in seen:
            seen.add(id(each))
            left.extend(_inside(each, path, ours))
    return found


def _inside(each, path, ours):
    if isinstance(each, dict):
        return [(part, f"{path}[]") for pair in each.items() for part in pair]
    if isinstance(each, list | tuple | set | frozenset | deque):
        return [(part, f"{path}[]") for part in each]
    if type(each).__module__.startswith(ours):
        return [(value, f"{path}.{name}") for name, value in _members(each)]
    return []


def _members(each):
    """What an object has, but for what the runtime keeps in it until it binds the next."""
    names = {*getattr(each, "__dict__", ()), *getattr(type(each), "__slots__", ())}
    names |= set(getattr(type(each), "__struct_fields__", ()))
    names -= {"_metadata", "_llm_args"}
    return [(name, getattr(each, name)) for name in sorted(names) if hasattr(each, name)]
