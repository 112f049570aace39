"""How an executor comes by its connector: what it refuses, and what it makes at once."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import standin_comm


def refuse(profile, args):
    """Raise for what a version does not run with a connector."""
    refused = {
        "a capacity policy": args.scheduler_config.capacity_scheduler_policy
        != "GUARANTEED_NO_EVICT"
        and not profile.layouts,
        "pipeline parallelism": args.pipeline_parallel_size > 1,
        "CUDA graphs": args.cuda_graph_config is not None and not profile.cuda_graphs,
        "speculation": args.speculative_config is not None,
    }
    if profile.refuses_parallel:
        refused |= {
            "context parallelism": args.context_parallel_size > 1,
            "beams": args.max_beam_width > 1,
            "attention DP": args.enable_attention_dp and not profile.main,
            "a host tier": bool(args.kv_cache_config.host_cache_size),
        }
    for what, is_there in refused.items():
        if is_there:
            raise NotImplementedError(f"{what} with a KV cache connector")
    if profile.main and not args.kv_cache_config.enable_block_reuse:
        raise ValueError("a KV cache connector needs block reuse")


def create(profile, args, communicator):
    """The worker of a rank, and the leader's scheduler; their constructors run side by side."""
    refuse(profile, args)
    config = args.kv_connector_config
    module = importlib.import_module(config.connector_module)
    scheduler_class = getattr(module, config.connector_scheduler_class)
    worker_class = getattr(module, config.connector_worker_class)

    def construct(made):
        with standin_comm.bound(communicator), communicator.alone():
            return made(args)

    with ThreadPoolExecutor(2, thread_name_prefix="trt-creator") as pool:
        worker = pool.submit(construct, worker_class)
        scheduler = pool.submit(construct, scheduler_class) if communicator.rank == 0 else None
        return worker.result(), scheduler and scheduler.result()
