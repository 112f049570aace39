"""A guard lets kernels write to pages until it is shut."""

from __future__ import annotations

import numpy as np
import pools
import pytest
import torch

from lmcache.core.kernels.plan import Planner, Span

CPU = torch.device("cpu")
PAGES = [7, 2, 3, 10, 0]
POISON = 0xA5


@pytest.fixture
def pool():
    made = pools.vllm("LBHNC", torch.uint8, 2, 4, layers=5)
    made.fill()
    return made


def load(interpreted, pool, stored, guard):
    planner = Planner(pool.layout)
    pages = planner.pages([Span(stored.data_ptr(), len(PAGES), 0, PAGES)])
    for shape in planner.shapes:
        kernel = interpreted.paged.PagedKernel(shape, CPU)
        kernel.launch(pages, to_stored=False, programs=3, guard=guard.ctypes.data)


def test_an_open_guard_lets_everybody_in_and_counts_them_out(interpreted, pool):
    stored, guard = pool.object(PAGES).clone(), np.zeros(4, np.int32)
    pool.memory.fill_(POISON)
    load(interpreted, pool, stored, guard)
    assert torch.equal(pool.object(PAGES), stored)
    assert guard.tolist() == [0] * 4


def test_nothing_is_written_behind_one_that_is_shut(interpreted, pool):
    stored, guard = pool.object(PAGES).clone(), np.zeros(4, np.int32)
    guard[0] = 5  # so many are in
    interpreted.guard.shut_kernel[(1,)](torch.from_numpy(guard), BIT=interpreted.guard.SHUT)
    assert guard[0] == interpreted.guard.SHUT + 5
    pool.memory.fill_(POISON)
    load(interpreted, pool, stored, guard)
    assert (pool.memory == POISON).all()
    assert guard[0] == interpreted.guard.SHUT + 5, "who was let in by nobody has left, too"
