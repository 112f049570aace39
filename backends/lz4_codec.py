"""The codec `lz4`: lossless, and unpacked faster than any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.core.errors import BackendError, ConfigError
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import CodecSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.backends.planes import Pack, Unpack
    from lmcache.core.codec import Codec


class Lz4:
    """Packs planes as LZ4 blocks."""

    name = "lz4"
    mark = b"LMCLZ4\0\1"

    def __init__(self) -> None:
        try:
            import lz4.block
        except ImportError:
            raise ConfigError(
                "the codec lz4 needs the package lz4: pip install 'lmcache[lz4]'"
            ) from None
        self._block = lz4.block

    def packer(self) -> Pack:
        """What packs planes, for one thread."""

        def pack(plane: memoryview) -> bytes:
            packed: bytes = self._block.compress(plane, store_size=False)
            return packed

        return pack

    def unpacker(self) -> Unpack:
        """What unpacks them, for one thread."""

        def unpack(packed: memoryview, plane: memoryview) -> None:
            try:
                data = self._block.decompress(packed, uncompressed_size=len(plane))
            except self._block.LZ4BlockError as error:
                raise BackendError(f"an lz4 object is damaged: {error}") from error
            if len(data) != len(plane):
                raise BackendError("an lz4 object is damaged: a plane is not as long as it was")
            plane[:] = data

        return unpack


def _create() -> Codec:
    from lmcache.backends.planes import PlaneCodec

    return PlaneCodec(Lz4())


@hookimpl
def lmcache_codecs() -> Iterable[CodecSpec]:
    yield CodecSpec(Lz4.name, _create, "LZ4 on byte planes; lossless")
