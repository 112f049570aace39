"""The names that LMCache/LMCache knows and that mean nothing here.

They are listed so that its configurations load: what is here is ignored, what is in no list is an
error.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_VARIABLES = frozenset(
    _words("""
    DEVICE_BACKEND DISABLE_BANNER EVICTION_POLICY GPU_STAGING_BUFFER_BYTES HOST HTTP_PORT
    L1_SIZE_GB MP_TRANSFER_MODE OFFLOAD_RPC_PORT ROCM_ENABLE_BATCH_MEMCPY
    TRACK_USAGE USAGE_TRACK_INTERVAL USAGE_TRACK_URL USE_EXPERIMENTAL USE_UPSTREAM_MP ZMQ_PORT
    """)
)
_VARIABLE_PREFIXES = _words(
    "AEROSPIKE_ CONTROLLER_ COORDINATOR_ MUSA_ REQUEST_TELEMETRY_ RESP_ RUNTIME_PLUGIN_"
)

IGNORED_KEYS = frozenset(
    _words("""
    app_id audit_actual_remote_url blend_check_layers blend_min_tokens blend_recompute_ratios
    blend_special_str blend_thresholds blocking_timeout_secs
    chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_auto_exit_timeout_hours
    chunk_statistics_auto_start_statistics chunk_statistics_strategy controller_pull_url
    controller_reply_url controller_url ec enable_async_loading enable_blending
    enable_chunk_statistics enable_controller enable_hidden_state_cache
    enable_lazy_memory_allocator enable_p2p enable_pd enable_scheduler_bypass_lookup enable_xpyd
    external_backends external_lookup_client extra_config gds_backend gds_buffer_size gds_path
    gds_path_sharding hidden_state_layers hidden_states_retrieve_mode hit_miss_ratio
    internal_api_server_enabled internal_api_server_host internal_api_server_include_index_list
    internal_api_server_port_start internal_api_server_socket_path_prefix
    lazy_memory_expand_trigger_ratio lazy_memory_initial_ratio lazy_memory_safe_size
    lazy_memory_step_ratio lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time
    lmcache_worker_ids lmcache_worker_port lmcache_worker_ports local_cpu_use_hugepages
    local_disk_path_sharding lookup_server_worker_ids maru_path maru_pool_size
    max_hidden_state_cpu_size max_tokens_per_load mp_host mp_port nixl_backends
    nixl_buffer_device nixl_buffer_size numa_mode p2p_host p2p_init_ports p2p_lookup_ports
    pd_allocation_timeout_sec pd_backend_mode pd_bidirectional pd_buffer_device pd_buffer_size
    pd_condition_poll_interval_sec pd_max_prefill_len pd_peer_alloc_port pd_peer_host
    pd_peer_init_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_role
    pd_shutdown_timeout_sec pd_skip_proxy_notification pin_check_interval_sec plugin_locations
    pre_caching_hash_algorithm py_enable_gc remote_config_url remote_serde
    remote_storage_plugins reserve_local_cpu_size retrieve_locations run_script_api_enabled
    runtime_plugin_locations script_allowed_imports storage_plugins store_location
    transfer_channel use_gds use_gpu_connector_v3
    """)
)
"""Configuration keys of upstream that mean nothing here."""

_IGNORED_PREFIXES = ("ec_", "mp.", "nixl_peer_")


def is_ignored_key(key: str) -> bool:
    """Whether upstream has this key and it means nothing here."""
    return key in IGNORED_KEYS or key.startswith(_IGNORED_PREFIXES)


def is_upstream_variable(name: str) -> bool:
    """The same for an environment variable, given without `LMCACHE_`."""
    return name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)
