"""The operations as `lmcache.c_ops` has them."""

from __future__ import annotations

import subprocess
import sys

import pools
import pytest
import torch

from lmcache import c_ops

PAGES = [7, 2, 3, 10, 0]
POOLS = pools.all_pools()


@pytest.mark.parametrize("name", POOLS)
def test_pages_become_an_object_and_pages_again(name):
    pool = POOLS[name]()
    expected = pool.object(PAGES)
    target = torch.zeros_like(expected)
    c_ops.gather(pool.layout, PAGES, target)
    assert torch.equal(target, expected)
    pool.memory.zero_()
    c_ops.scatter(pool.layout, PAGES, target)
    assert torch.equal(pool.object(PAGES), expected)
    pool.fill()


def test_no_pages():
    c_ops.gather(POOLS["trtllm_by_layer-bfloat16"]().layout, [], torch.zeros(0, dtype=torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1151, dtype=torch.uint8),
        torch.zeros(1152, dtype=torch.int8),
        torch.zeros(2304, dtype=torch.uint8)[::2],
    ],
    ids=["too short", "another dtype", "gaps"],
)
def test_another_tensor_than_wanted(tensor):
    layout = POOLS["trtllm_by_layer-bfloat16"]().layout
    assert layout.page_bytes == 1152
    for operation in (c_ops.gather, c_ops.scatter):
        with pytest.raises(ValueError, match="where 1152 contiguous bytes are wanted"):
            operation(layout, [3], tensor)


def test_pages_that_are_not_there():
    layout = POOLS["trtllm_by_layer-bfloat16"]().layout
    with pytest.raises(IndexError, match="page ids 11..11; the engine has 11"):
        c_ops.gather(layout, [11], torch.zeros(1152, dtype=torch.uint8))


def test_an_installation_is_tested_like_this():
    """The seeds' own line, and what serves here."""
    code = "import torch; import lmcache; import lmcache.c_ops as ops; print(ops.serving_path())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == c_ops.serving_path()
    if not torch.cuda.is_available():
        assert said.stdout.strip() == "memmove on the host"
