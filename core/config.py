"""Where the configuration comes from: defaults < file < environment < the engine's own options.

Every value remembers its source, and a name nobody knows is an error: an option that is accepted
and ignored is worse than none. No other module reads the environment for configuration.
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from lmcache.core.config_keys import Config, expected
from lmcache.core.environment import (
    ENGINE_VARIABLES,
    PREFIX,
    TEST_PREFIX,
    VARIABLES,
    environment_flag,
    is_service_link,
)
from lmcache.core.errors import ConfigError
from lmcache.core.kernels.paths import forced_path
from lmcache.core.redact import redact_value
from lmcache.core.upstream_names import is_ignored_key, is_upstream_variable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from pydantic_core import ErrorDetails

_log = logging.getLogger("lmcache")


@dataclass(frozen=True)
class Setting:
    """One effective value, fit to be shown."""

    key: str
    value: Any
    """Without secrets."""
    source: str


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each of its values came from."""

    config: Config
    sources: Mapping[str, str]
    """Source of each key, e.g. `default` or `/etc/lmcache.yaml:3`."""
    ignored: tuple[str, ...] = ()
    """Keys that upstream knows and that mean nothing here, each with its source."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Values of the keys that are whoever's that asked."""

    def settings(self) -> list[Setting]:
        """Every key in the order of the documentation."""
        return [
            Setting(key, redact_value(getattr(self.config, key)), source)
            for key, source in self.sources.items()
        ]


@dataclass(frozen=True)
class _Entry:
    name: str
    """As the user spelled it."""
    key: str
    value: Any
    source: str


def load_config(
    extra: Mapping[str, Any] | None = None,
    env: Mapping[str, str] = os.environ,
    *,
    file: str | None = None,
    others: Collection[str] = (),
) -> LoadedConfig:
    """The effective configuration.

    `extra` is the engine's own: vLLM's `kv_connector_extra_config`, where our keys begin with
    `lmcache.` and all others are the engine's. `file` replaces the one `LMCACHE_CONFIG_FILE` names.
    `others` are keys beside ours that mean something to who asks.
    """
    chosen: dict[str, _Entry] = {}
    found: dict[str, Any] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    path = file or env.get("LMCACHE_CONFIG_FILE")
    for entry in [*_read_file(path), *_read_environment(env), *_read_extra(extra or {})]:
        if entry.key in Config.model_fields:
            chosen[entry.key] = entry
        elif entry.key in others:
            found[entry.key] = entry.value
        elif is_ignored_key(entry.key):
            ignored.append(f"{entry.key} ({entry.source})")
        else:
            unknown.append(_describe_unknown(entry))
    if unknown:
        raise ConfigError("; ".join(unknown))
    config = _validate(chosen)
    forced_path(env)  # who uses it comes up later, and could only serve without a cache
    if ignored:
        _log.warning("ignoring configuration that means nothing here: %s", ", ".join(ignored))
    sources = {
        key: chosen[key].source if key in chosen else "default" for key in Config.model_fields
    }
    return LoadedConfig(config, sources, tuple(ignored), found)


def _read_file(path: str | None) -> Iterator[_Entry]:
    if not path:
        return
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} is not a mapping of configuration keys")
        seen: dict[str, str] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            source = f"{path}:{key_node.start_mark.line + 1}"
            if key in seen:
                raise ConfigError(f"{key} is set twice: {seen[key]} and {source}")
            seen[key] = source
            yield _Entry(key, key, loader.construct_object(value_node, deep=True), source)
    except yaml.MarkedYAMLError as exc:
        line = f":{exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise ConfigError(f"{path}{line} is not YAML: {exc.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"configuration file {path!r} cannot be read: {reason}") from exc


def _read_environment(env: Mapping[str, str]) -> Iterator[_Entry]:
    for name in sorted(name for name in env if name.startswith(PREFIX)):
        rest = name.removeprefix(PREFIX)
        key = rest.lower() if rest.isupper() else name
        is_key = key in Config.model_fields or is_ignored_key(key)
        is_known = is_key or name in VARIABLES or is_upstream_variable(rest)
        is_foreign = (
            name.startswith(TEST_PREFIX) or name in ENGINE_VARIABLES or is_service_link(name, env)
        )
        if (is_key or not is_known) and not is_foreign:
            yield _Entry(name, key, env[name].strip(), f"environment variable {name}")


def _read_extra(extra: Mapping[str, Any]) -> Iterator[_Entry]:
    for name, value in extra.items():
        if name.startswith("lmcache."):
            yield _Entry(name, name.removeprefix("lmcache."), value, f"engine option {name}")


def _validate(chosen: Mapping[str, _Entry]) -> Config:
    try:
        return Config.model_validate({key: entry.value for key, entry in chosen.items()})
    except ValidationError as exc:
        problems = (_describe_problem(error, chosen) for error in exc.errors(include_url=False))
        # not chained: the original holds the values, secrets included
        raise ConfigError("; ".join(dict.fromkeys(problems))) from None


def _describe_problem(error: ErrorDetails, chosen: Mapping[str, _Entry]) -> str:
    if error["type"] == "conflict":
        places = [chosen[key].source for key in error["ctx"]["keys"] if key in chosen]
        return f"{error['msg']} ({', '.join(places)})"
    entry = chosen[str(error["loc"][0])]
    shown = repr(redact_value(entry.value))
    return f"{entry.key} is {shown} ({entry.source}), expected {expected(entry.key)}"


def _describe_unknown(entry: _Entry) -> str:
    known = list(Config.model_fields)
    if entry.name.startswith(PREFIX):
        known = [*VARIABLES, *(PREFIX + key.upper() for key in known)]
    elif entry.name != entry.key:
        known = ["lmcache." + key for key in known]
    nearest = difflib.get_close_matches(entry.name, known, n=1, cutoff=0.0)[0]
    return f"unknown configuration key {entry.name!r} ({entry.source}), the nearest is {nearest!r}"


__all__ = ["Config", "LoadedConfig", "Setting", "environment_flag", "load_config"]
