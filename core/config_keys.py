"""The configuration keys, each with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lmcache.core.config_types import (
    Amount,
    Directory,
    Expected,
    Flag,
    Name,
    Natural,
    OptionalNumber,
    OptionalText,
    OptionalUrl,
    Port,
    Positive,
    PositiveAmount,
    Text,
    Urls,
    split_directory,
)
from lmcache.core.redact import redact_value

if TYPE_CHECKING:
    from typing_extensions import Self

GIB = 1 << 30


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
        default=256,
        description="Tokens in a chunk, the unit that is stored and found; a whole number of the"
        " engine's pages.",
    )
    local_cpu: Flag = Field(
        default=True,
        description="Keep chunks in memory; if false, memory is only a buffer in front of the other"
        " tiers, of which there must be one.",
    )
    max_local_cpu_size: PositiveAmount = Field(
        default=5.0,
        description="Memory for chunks in GiB, for the whole node and all ranks together.",
    )
    local_disk: Directory = Field(
        default=None,
        description="Directory, or `file://` URL, of the disk tier; none for no disk tier.",
    )
    max_local_disk_size: Amount = Field(
        default=0.0,
        description="Space for the disk tier in GiB; must be set along with `local_disk`.",
    )
    remote_url: OptionalUrl = Field(
        default=None, description="URL of a storage backend that is asked after all other tiers."
    )
    l2: Urls = Field(
        default=(),
        description="URLs of storage backends in the order in which they are asked, after the disk"
        " tier; in the environment separated by commas.",
    )
    use_layerwise: Flag = Field(
        default=False, description="Load and store layer by layer, while the engine computes."
    )
    save_decode_cache: Flag = Field(
        default=False, description="Store generated tokens too, not only prompts."
    )
    save_unfull_chunk: Flag = Field(
        default=True,
        description="Store the tail of a prompt that does not fill a chunk, in whole engine pages;"
        " the default of LMCache/LMCache is false.",
    )
    cache_policy: Name = Field(
        default="LRU",
        description="Eviction policy of the memory tier, by name; `lmcache plugins` lists them.",
    )
    lookup_timeout_ms: Positive = Field(
        default=20,
        description="Milliseconds that a lookup waits for the index; past them it is a miss.",
    )
    fetch_timeout_ms: Natural = Field(
        default=5000,
        description="Milliseconds for which a request may wait, outside the batch, for a slower"
        " tier before it is computed instead.",
    )
    pin_timeout_sec: Positive = Field(
        default=300,
        description="Seconds after which a request loses its lease on the chunks it was promised.",
    )
    min_retrieve_tokens: Natural = Field(
        default=0, description="Tokens below which a hit is not worth loading and counts as a miss."
    )
    priority_limit: OptionalNumber = Field(
        default=None,
        description="Requests whose priority value is above it are not stored; none for no limit.",
    )
    model_id: OptionalText = Field(
        default=None,
        description="Stands for the model in keys instead of the name the engine gives.",
    )
    weight_generation: Text = Field(
        default="",
        description="Part of every key: change it when the weights change, and all that was stored"
        " before is out of reach.",
    )
    exchange: Text = Field(
        default="",
        description="Name under which engines of different kinds share chunks; all that are told"
        " the same must serve the same weights.",
    )
    enable_kv_events: Flag = Field(
        default=False, description="Tell the engine what was stored, as KV events."
    )
    metrics_port: Port = Field(
        default=0,
        description="Loopback port of the Prometheus endpoint, in the process that decides; 0 for"
        " none.",
    )
    lmcache_instance_id: OptionalText = Field(
        default=None,
        description="Name of this instance in metrics and logs; by default the engine's own id.",
    )

    def tier_urls(self) -> tuple[str, ...]:
        """The storage backends, in the order in which they are asked: disk, `l2`, remote."""
        disk = () if self.local_disk is None else (self._disk_url(self.local_disk),)
        remote = () if self.remote_url is None else (self.remote_url,)
        return (*disk, *self.l2, *remote)

    def _disk_url(self, directory: str) -> str:
        path, options = split_directory(directory)
        size = f"max_size={round(self.max_local_disk_size * GIB)}"
        location = quote(str(Path(path).expanduser().absolute()))
        return f"file://{location}?{options}&{size}" if options else f"file://{location}?{size}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        def conflict(message: str, *keys: str) -> PydanticCustomError:
            return PydanticCustomError("conflict", message, {"keys": keys})

        if not self.local_cpu and not self.tier_urls():
            raise conflict(
                "nothing would be cached: local_cpu is false and none of local_disk, l2 and"
                " remote_url is set",
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
