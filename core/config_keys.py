"""The configuration keys, each with its type, default and meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from lmcache.core.redact import redact_value

GIB = 1 << 30


@dataclass(frozen=True)
class Expected:
    """What a value must be, for messages and for the documentation."""

    text: str


def _refuse_flag(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("flag", "a flag is not a number")
    return value


def _none_if_empty(value: object) -> object:
    return None if isinstance(value, str) and value.lower() in ("", "none", "null") else value


def _split_urls(value: object) -> object:
    # a URL may hold commas of its own, so one ends only where the next scheme begins
    if isinstance(value, str):
        return tuple(filter(None, re.split(r"[\s,]+(?=[a-zA-Z][\w+.-]*://)", value.strip(" ,"))))
    return () if value is None else value


def _parse_mapping(value: object) -> object:
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        raise PydanticCustomError("mapping", "not a mapping") from None


def _check_url(value: str) -> str:
    if not re.match(r"[a-zA-Z][\w+.-]*://.", value):
        raise PydanticCustomError("url", "not a URL")
    return value


def _split_directory(value: str) -> tuple[str, str]:
    """The path and the options of a directory, given as a path or a `file://` URL."""
    if not value.startswith("file://"):
        return value, ""
    path, _, options = value.removeprefix("file://").partition("?")
    return unquote(path), options


def _check_directory(value: str) -> str:
    path, options = _split_directory(value)
    if not path or "," in path or "://" in path or "max_size=" in options:
        raise PydanticCustomError("directory", "not one directory")
    return value


_NUMBER = BeforeValidator(_refuse_flag)
_OPTIONAL = BeforeValidator(_none_if_empty)

Flag = Annotated[bool, Expected("true or false")]
Text = Annotated[str, Expected("text")]
Name = Annotated[str, Field(min_length=1), Expected("a name")]
OptionalText = Annotated[str | None, _OPTIONAL, Expected("text, or none")]
Natural = Annotated[int, _NUMBER, Field(ge=0), Expected("a whole number, 0 or more")]
Positive = Annotated[int, _NUMBER, Field(gt=0), Expected("a whole number above 0")]
OptionalNumber = Annotated[int | None, _OPTIONAL, _NUMBER, Expected("a whole number, or none")]
Port = Annotated[int, _NUMBER, Field(ge=0, le=65535), Expected("a port, or 0")]
Amount = Annotated[float, _NUMBER, Field(ge=0), Expected("a number, 0 or more")]
PositiveAmount = Annotated[float, _NUMBER, Field(gt=0), Expected("a number above 0")]
Url = Annotated[str, AfterValidator(_check_url)]
OptionalUrl = Annotated[Url | None, _OPTIONAL, Expected("a URL like redis://host:6379, or none")]
Urls = Annotated[tuple[Url, ...], BeforeValidator(_split_urls), Expected("a list of URLs")]
Directory = Annotated[
    Annotated[str, AfterValidator(_check_directory)] | None,
    _OPTIONAL,
    Expected("one directory, as a path or a file:// URL without max_size, or none"),
]
Settings = Annotated[
    dict[str, Any] | None,
    _OPTIONAL,
    BeforeValidator(_parse_mapping),
    Expected("a mapping, or none"),
]


class Config(BaseModel):
    """What the user wants. Immutable; its repr shows no secrets."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    chunk_size: Positive = Field(
        256,
        description="Tokens in a chunk, the unit that is stored and found; a whole number of the"
        " engine's pages.",
    )
    local_cpu: Flag = Field(
        True,
        description="Keep chunks in memory; if false, memory is only a buffer in front of the other"
        " tiers, of which there must be one.",
    )
    max_local_cpu_size: PositiveAmount = Field(
        5.0, description="Memory for chunks in GiB, for the whole node and all ranks together."
    )
    local_disk: Directory = Field(
        None, description="Directory, or `file://` URL, of the disk tier; none for no disk tier."
    )
    max_local_disk_size: Amount = Field(
        0.0, description="Space for the disk tier in GiB; must be set along with `local_disk`."
    )
    remote_url: OptionalUrl = Field(
        None, description="URL of a storage backend that is asked after all other tiers."
    )
    l2: Urls = Field(
        (),
        description="URLs of storage backends in the order in which they are asked, after the disk"
        " tier; in the environment separated by commas.",
    )
    use_layerwise: Flag = Field(
        False, description="Load and store layer by layer, while the engine computes."
    )
    save_decode_cache: Flag = Field(
        False, description="Store generated tokens too, not only prompts."
    )
    save_unfull_chunk: Flag = Field(
        True,
        description="Store the tail of a prompt that does not fill a chunk, in whole engine pages;"
        " upstream's default is false.",
    )
    cache_policy: Name = Field(
        "LRU",
        description="Eviction policy of the memory tier, by name; `lmcache plugins` lists them.",
    )
    lookup_timeout_ms: Positive = Field(
        20,
        description="Milliseconds after which a lookup is a miss; the scheduler never waits longer.",
    )
    fetch_timeout_ms: Natural = Field(
        5000,
        description="Milliseconds for which a request may wait, outside the batch, for a slower tier"
        " before it is computed instead.",
    )
    pin_timeout_sec: Positive = Field(
        300,
        description="Seconds after which a request loses its lease on the chunks it was promised.",
    )
    min_retrieve_tokens: Natural = Field(
        0, description="Tokens below which a hit is not worth loading and counts as a miss."
    )
    priority_limit: OptionalNumber = Field(
        None,
        description="Requests whose priority value is above it are not stored; none for no limit.",
    )
    model_id: OptionalText = Field(
        None, description="Stands for the model in keys instead of the name the engine gives."
    )
    weight_generation: Text = Field(
        "",
        description="Part of every key: change it when the weights change, and all that was stored"
        " before is out of reach.",
    )
    enable_kv_events: Flag = Field(
        False, description="Tell the engine what was stored, as KV events."
    )
    metrics_port: Port = Field(
        0,
        description="Loopback port of the Prometheus endpoint, in the process that decides; 0 for no"
        " endpoint.",
    )
    lmcache_instance_id: OptionalText = Field(
        None,
        description="Name of this instance in metrics and logs; by default the engine's own id.",
    )
    extra_config: Settings = Field(None, description="Settings of plugins, by name.")

    def tier_urls(self) -> tuple[str, ...]:
        """The storage backends, in the order in which they are asked: disk, `l2`, remote."""
        disk = () if self.local_disk is None else (self._disk_url(self.local_disk),)
        remote = () if self.remote_url is None else (self.remote_url,)
        return (*disk, *self.l2, *remote)

    def _disk_url(self, directory: str) -> str:
        path, options = _split_directory(directory)
        size = f"max_size={round(self.max_local_disk_size * GIB)}"
        location = quote(str(Path(path).expanduser().absolute()))
        return f"file://{location}?{options}&{size}" if options else f"file://{location}?{size}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        def conflict(message: str, *keys: str) -> PydanticCustomError:
            return PydanticCustomError("conflict", message, {"keys": keys})

        if not self.local_cpu and not self.tier_urls():
            raise conflict(
                "nothing would be cached: local_cpu is false and none of local_disk, l2 and remote_url"
                " is set",
                "local_cpu",
            )
        if self.local_disk is not None and not self.max_local_disk_size:
            raise conflict(
                "local_disk needs a size: set max_local_disk_size to the GiB it may fill",
                "local_disk",
            )
        if self.local_disk is None and self.max_local_disk_size:
            raise conflict(
                "max_local_disk_size is set for no disk tier: set local_disk to a directory",
                "max_local_disk_size",
            )
        return self

    def __repr_args__(self) -> Any:
        return [(name, redact_value(value)) for name, value in super().__repr_args__()]


def expected(key: str) -> str:
    """What the value of a key must be."""
    return next(m.text for m in Config.model_fields[key].metadata if isinstance(m, Expected))
