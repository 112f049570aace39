"""What was granted by a process that has died can still be loaded from, for a while."""

from __future__ import annotations

import pytest
import rig
import torch

from lmcache.core.grants import Grants
from lmcache.core.handover import Grant, Visit, address_of
from lmcache.core.mover import Move
from lmcache.core.slab import CONTROL_BYTES, Slab


@pytest.fixture
def slab(workshop):
    made = Slab.create(1 << 17)
    workshop.later(made.close)
    return made


@pytest.fixture
def begin(workshop):
    """A worker's grants, and an address at which it listens."""

    def begin(keeps_s):
        pages, engine = rig.Pages(), rig.engine_id()
        grants = Grants(keeps_s=keeps_s)
        grants.open(engine, 0, pages.layout, list(torch.from_numpy(pages.memory)))
        workshop.later(grants.close)
        workshop.later(grants.leave)
        return grants, pages, address_of(engine, 0)

    return begin


def attach(address, slab, attachment=7):
    visit = Visit(address, 5.0)
    grant = Grant(
        attachment=attachment,
        slab_bytes=slab.size,
        word=0,
        pages_per_chunk=rig.PAGES_PER_CHUNK,
        slices=(rig.PAGE_BYTES,),
        layout=bytes(32),
        writes=True,
    )
    visit.grant(grant, slab.fd)
    return visit


def is_gone(granted):
    return granted.mover._slab.fd == -1


def test_it_loads_what_the_dead_had_promised(begin, slab):
    grants, pages, address = begin(60.0)
    visit = attach(address, slab)
    move = Move(CONTROL_BYTES, 5, rig.PAGES_PER_CHUNK, 0, list(range(rig.PAGES_PER_CHUNK)))
    mover = grants.current(7).mover
    pages.memory[:] = 3
    mover.store([move])
    mover.publish([move])
    pages.memory[:] = 0
    visit.close()
    rig.wait_until(lambda: grants.kept(7))
    assert (grants.current(7), grants.kept(8)) == (None, None)
    assert grants.kept(7).mover.load([move])[1] == []
    assert (pages.memory[:, : rig.PAGES_PER_CHUNK] == 3).all()
    grants.leave()
    assert grants.kept(7) is None
    assert mover.load([move])[1] == [move]


def test_only_for_a_while(begin, slab):
    grants, _, address = begin(0.1)
    visit = attach(address, slab)
    granted = grants.current(7)
    visit.close()
    rig.wait_until(lambda: grants.kept(7))
    rig.wait_until(lambda: is_gone(granted))
    assert grants.kept(7) is None


def test_the_next_to_die_takes_its_place(begin, slab):
    grants, _, address = begin(60.0)
    first = attach(address, slab, 7)
    granted = grants.current(7)
    first.close()
    rig.wait_until(lambda: grants.kept(7))
    second = attach(address, slab, 8)
    assert (grants.current(8).attachment, grants.kept(7).attachment) == (8, 7)
    second.close()
    rig.wait_until(lambda: grants.kept(8))
    rig.wait_until(lambda: is_gone(granted))
    assert grants.kept(7) is None


@pytest.mark.parametrize(("keeps_s", "dies"), [(60.0, False), (0.0, True)])
def test_nothing_of_who_waits_for_us_to_let_go(begin, slab, keeps_s, dies):
    grants, _, address = begin(keeps_s)
    visit = attach(address, slab)
    granted = grants.current(7)
    visit.close() if dies else visit.leave()
    rig.wait_until(lambda: is_gone(granted))
    assert grants.kept(7) is None
    rig.wait_until(lambda: not visit.is_alive())
    visit.close()
