"""How pools are described since there are groups of layers."""

from __future__ import annotations

from dataclasses import dataclass, field

BAD_PAGE_INDEX = -1


def valid_page_slots(ids):
    """Ordinals and slots, without those that are not there."""
    return [(ordinal, slot) for ordinal, slot in enumerate(ids) if slot != BAD_PAGE_INDEX]


@dataclass(frozen=True)
class KvCacheRegion:
    """Slots at equal distances; `memory` is what real ones have no need of."""

    base: int
    size: int
    stride: int
    num_slots: int
    buffers: tuple[tuple[int, str, int], ...]
    memory: object = field(repr=False, compare=False)

    def as_tensor(self, dtype):
        return self.memory.view(dtype)

    def slot_tensor(self, slot):
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        return self.memory[slot]


@dataclass(frozen=True)
class KvCacheLayerGroup:
    layer_group_id: int
    layer_ids: tuple[int, ...]
    window_size: int | None
    regions: tuple[KvCacheRegion, ...]

    @property
    def bytes_per_page(self):
        return sum(region.size for region in self.regions)


@dataclass(frozen=True)
class KvCacheLayout:
    tokens_per_block: int
    dtype: object
    groups: tuple[KvCacheLayerGroup, ...]
    single: object = field(default=None, repr=False, compare=False)

    def as_single_pool_tensor(self):
        if self.single is None:
            raise ValueError("these pools are no single tensor")
        return self.single
