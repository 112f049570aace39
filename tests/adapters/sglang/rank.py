"""One of two ranks, in a process of its own: what it found in turn, as JSON.

python rank.py RANK PORT CONFIG_FILE
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import torch.distributed as dist
from pool import MODEL, Pool, finish, forward, match, tokens

from lmcache.integration.sglang.sglang_adapter import LMCacheLayerwiseConnector


def main(rank, port, config_file):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    wrapper = SimpleNamespace(device_group=dist.group.WORLD)
    pool, prompt, found = Pool(rank=rank), tokens(40), []
    connector = LMCacheLayerwiseConnector(MODEL, 2, rank, pool.k, pool.v, config_file, wrapper)

    def look():
        found.append(len(match(connector, pool, prompt)))
        forward(connector, pool.layers)

    look()
    slots = pool.take(40)
    pool.compute(prompt, slots)
    finish(connector, prompt, slots)
    look()
    if rank == 1:
        connector.reset()
    look()
    if rank == 0:
        connector._cache.scheduler.find = None
    look()
    dist.barrier()
    connector.close()
    dist.destroy_process_group()
    print(json.dumps(found))


main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
