"""The pages of an engine that does not compute: their shape, their content, their checksums."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_digest

from lmcache.core.errors import ConfigError
from lmcache.core.layout import PageLayout, region_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.kernels.copier import PageCopier
    from lmcache.core.layout import Region
    from lmcache.core.lending import LentPages
    from lmcache.core.slab import Slab

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8": 1, "uint8": 1, "int8": 1}
POISON = 0xA5

_GROUP = re.compile(r"\((\d+),(\d+),(\d+),(\d+),(\d+)\):(\w+):(\d+)")


@dataclass(frozen=True)
class Shape:
    """Some layers of one kind: K and V, blocks, tokens in a block, heads, elements of a head."""

    kv: int
    blocks: int
    block_size: int
    heads: int
    head_size: int
    dtype: str
    layers: int

    @property
    def bytes_per_token(self) -> int:
        """Over all layers."""
        return self.kv * self.heads * self.head_size * ITEM_BYTES[self.dtype] * self.layers


def parse_shapes(text: str) -> list[Shape]:
    """The shapes in a text like `(2,1024,16,8,128):float16:32`, several separated by `;`.

    Raises `ConfigError` for what is no such text, and for groups with different blocks.
    """
    shapes = []
    for part in filter(None, text.replace(" ", "").split(";")):
        found = _GROUP.fullmatch(part)
        if not found or found[6] not in ITEM_BYTES:
            raise ConfigError(
                f"--kvcache-shape-spec {part!r} is not like (2,1024,16,8,128):float16:32, with one "
                f"of the types {', '.join(ITEM_BYTES)}"
            )
        kv, blocks, size, heads, head_size = map(int, found.groups()[:5])
        shapes.append(Shape(kv, blocks, size, heads, head_size, found[6], int(found[7])))
    if len({(shape.blocks, shape.block_size) for shape in shapes}) != 1:
        raise ConfigError("--kvcache-shape-spec needs groups with the same blocks")
    if any(0 in vars(shape).values() for shape in shapes):
        raise ConfigError("--kvcache-shape-spec has a zero in it")
    return shapes


class BenchPages:
    """Memory with random content, laid out as an engine does it."""

    lent: LentPages | None = None
    """Set if the server is to copy."""

    def __init__(self, shapes: Sequence[Shape], *, lends: bool = False, seed: int = 42) -> None:
        """With `lends`, the memory can be handed to a server; that needs torch."""
        self.blocks, self.block_size = shapes[0].blocks, shapes[0].block_size
        self.block_bytes = self.block_size * sum(shape.bytes_per_token for shape in shapes)
        self._arrays = self._allocate([_empty(shape) for shape in _each(shapes)], lends=lends)
        rng = np.random.default_rng(seed)
        for array in self._arrays:
            one_layer = rng.integers(0, 255, array.shape[1:], np.uint8)  # K and V may be alike
            array[...] = self._there(one_layer)
        self.regions = [
            (f"layer.{layer}.{kv}", part, shape.dtype)
            for layer, (array, shape) in enumerate(zip(self._arrays, _each(shapes), strict=True))
            for kv, part in enumerate(array)
        ]
        regions = (self._region(*region) for region in self.regions)
        self.layout = PageLayout(tuple(regions), self.block_size, "bench")

    def copier(self, slab: Slab) -> PageCopier | None:
        """Who copies between them and a slab; None for threads of a mover's own."""
        return None

    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        """One for each block, over all layers."""
        index = list(blocks)
        parts = [np.ascontiguousarray(self._here(a[:, index]).swapaxes(0, 1)) for a in self._arrays]
        return [
            xxh3_128_digest(b"".join(part[i].tobytes() for part in parts))
            for i in range(len(index))
        ]

    def vary(self, blocks: Sequence[int], seed: int) -> None:
        """Give blocks a content that no other seed gives them."""
        rng = np.random.default_rng(seed)
        for array in self._arrays:
            first_token = rng.integers(0, 255, array.shape[-1], np.uint8)
            array[:, list(blocks), 0] = self._there(first_token)

    def poison(self, blocks: Sequence[int]) -> None:
        """So that what is not retrieved cannot pass for what is."""
        for array in self._arrays:
            array[:, list(blocks)] = POISON

    def _allocate(self, arrays: list[Any], *, lends: bool) -> list[Any]:
        if not lends:
            return arrays
        import torch

        from lmcache.core.lending import lendable

        tensors = [torch.from_numpy(array) for array in arrays]
        self.lent = lendable(tensors)
        return [tensor.numpy() for tensor in tensors]

    def _there(self, content: Any) -> Any:
        return content

    def _here(self, content: Any) -> Any:
        return content

    def _region(self, name: str, part: Any, dtype: str) -> Region:
        """K and V lie apart: each is a region, so that runs of neighbouring blocks are one."""
        address, strides = part.ctypes.data, part.strides
        return region_of(name, address, part.shape, strides, itemsize=1, dtype=dtype, page_axis=0)


class DevicePages(BenchPages):
    """Likewise, in the memory of a device that torch knows."""

    def __init__(self, shapes: Sequence[Shape], device: str, *, lends: bool = False) -> None:
        """Raises `ConfigError` if there is no such device."""
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--mode is 'gpu', but torch finds no CUDA device")
        self._device = torch.device(device)
        super().__init__(shapes, lends=lends)

    def copier(self, slab: Slab) -> PageCopier:
        """By where they are."""
        from lmcache.core.kernels.copier import copier_for

        return copier_for(self.layout, slab, [part for _, part, _ in self.regions])

    def _allocate(self, arrays: list[Any], *, lends: bool) -> list[Any]:
        import torch

        from lmcache.core.lending import lendable

        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        self.lent = lendable(tensors) if lends else None
        return tensors

    def _there(self, content: Any) -> Any:
        import torch

        return torch.from_numpy(content).to(self._device)

    def _here(self, content: Any) -> Any:
        return content.cpu().numpy()

    def _region(self, name: str, part: Any, dtype: str) -> Region:
        address, strides = part.data_ptr(), part.stride()
        return region_of(name, address, part.shape, strides, itemsize=1, dtype=dtype, page_axis=0)


def _each(shapes: Sequence[Shape]) -> list[Shape]:
    return [shape for shape in shapes for _ in range(shape.layers)]


def _empty(shape: Shape) -> Any:
    width = shape.heads * shape.head_size * ITEM_BYTES[shape.dtype]
    return np.zeros((shape.kv, shape.blocks, shape.block_size, width), np.uint8)
