"""The codec `zstd`: lossless, and the smallest of those that are fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.core.errors import BackendError, ConfigError
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import CodecSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.backends.planes import Pack, Unpack
    from lmcache.core.codec import Codec

_LEVEL = 1
# signs and exponents are unevenly spread, but few rows of them repeat: to look for more of those
# costs more than it saves, in bytes and in time
_FEW_MATCHES = {"min_match": 7, "hash_log": 10}


class Zstd:
    """Packs planes with Zstandard, entropy first."""

    name = "zstd"
    mark = b"LMCZSTD1"

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise ConfigError(
                "the codec zstd needs the package zstandard: pip install 'lmcache[zstd]'"
            ) from None
        self._zstd = zstandard

    def packer(self) -> Pack:
        """What packs planes, for one thread."""
        parameters = self._zstd.ZstdCompressionParameters.from_level(_LEVEL, **_FEW_MATCHES)
        return self._zstd.ZstdCompressor(compression_params=parameters).compress

    def unpacker(self) -> Unpack:
        """What unpacks them, for one thread."""
        decoder = self._zstd.ZstdDecompressor(max_window_size=1 << 20)

        def unpack(packed: memoryview, plane: memoryview) -> None:
            try:
                with decoder.stream_reader(packed) as reader:
                    size = reader.readinto(plane)
                    rest = reader.read(1)
            except self._zstd.ZstdError as error:
                raise BackendError(f"a zstd object is damaged: {error}") from error
            if size != len(plane) or rest:
                raise BackendError("a zstd object is damaged: a plane is not as long as it was")

        return unpack


def _create() -> Codec:
    from lmcache.backends.planes import PlaneCodec

    return PlaneCodec(Zstd())


@hookimpl
def lmcache_codecs() -> Iterable[CodecSpec]:
    yield CodecSpec(Zstd.name, _create, "Zstandard on byte planes; lossless")
