"""How the versions of TensorRT-LLM differ, one line for each difference."""

from __future__ import annotations

from dataclasses import dataclass

OLD_PATH = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"
NEW_PATH = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
FIVE = (
    "request_id",
    "new_tokens",
    "new_block_ids",
    "computed_position",
    "num_scheduled_tokens",
)


@dataclass(frozen=True)
class Profile:
    """What one version does; the defaults are those of the oldest."""

    name: str
    path: str = OLD_PATH
    fields: tuple[str, ...] = FIVE
    output_fields: tuple[str, ...] = ("new_requests", "cached_requests")
    salt: str | None = None
    presets: tuple[str, ...] = ()
    layouts: bool = False
    """Whether pools are handed over as layouts, one for each group of layers."""
    main: bool = False
    asks_in_batches: bool = False
    """All queries of a batch before the first update."""
    surplus_forward: bool = False
    """Under overlap, one pass too many for a request that has ended."""
    execution_stream: bool = False
    tells_of_cancels: bool = False
    """`request_finished` is called for cancelled requests."""
    finishes_at_termination: bool = False
    """And for failed ones."""
    drains_loads: bool = False
    """A cancelled request keeps its blocks until its load is over."""
    one_release: bool = False
    """Of the saves that end in an iteration one takes effect, and the others never do."""
    cuda_graphs: bool = True
    waits_for_start: bool = False
    refuses_parallel: bool = False
    """Context parallelism, beams, attention DP and a host tier are refused by name."""

    @property
    def server_url(self):
        return bool(self.presets)


_THREE = ("lmcache", "kvbm", "lmcache-mp")
_MAIN = {
    "path": NEW_PATH,
    "fields": (
        *FIVE,
        "block_hashes",
        "priorities",
        "cache_salt",
        "new_block_ids_by_layer_group",
    ),
    "output_fields": ("new_requests", "cached_requests", "attention_dp_rank"),
    "salt": "cache_salt",
    "presets": (*_THREE, "mooncake-store"),
    "main": True,
    "asks_in_batches": True,
    "execution_stream": True,
    "tells_of_cancels": True,
    "drains_loads": True,
    "waits_for_start": True,
    "refuses_parallel": True,
}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "v1_1",
            surplus_forward=True,
            tells_of_cancels=True,
            finishes_at_termination=True,
            one_release=True,
            cuda_graphs=False,
        ),
        Profile("v1_2", surplus_forward=True, execution_stream=True),
        Profile(
            "v1_3",
            path=NEW_PATH,
            fields=(*FIVE, "priorities", "cache_salt_id"),
            salt="cache_salt_id",
            presets=_THREE,
            asks_in_batches=True,
            execution_stream=True,
            waits_for_start=True,
            refuses_parallel=True,
        ),
        Profile("main_v1", **_MAIN),
        Profile("main_v2", layouts=True, **_MAIN),
    )
}
