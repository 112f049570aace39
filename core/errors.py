"""Every error LMCache raises on purpose.

* LMCacheError
  x ConfigError        the configuration cannot be honoured; raised before memory is allocated
  x PluginError        a plugin cannot be loaded, or two plugins claim one name
  x LayoutError        the engine's KV layout is not one we can copy safely
  x DeviceError        a GPU or its driver did not do what it was asked for
  x HandoverError      the processes of one engine could not agree on a shared slab
  x ServiceError       the cache server cannot be reached, or is not understood
  x BackendError       a storage backend failed; the tier counts it and answers "miss"
    + BackendClosed
    + Unsupported
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base class of every error raised by this package."""


class ConfigError(LMCacheError):
    """The configuration cannot be honoured; raised before any memory is allocated."""


class PluginError(LMCacheError):
    """A plugin cannot be loaded, or two plugins claim one name."""


class LayoutError(LMCacheError):
    """The engine's KV layout is not one we know how to copy."""


class DeviceError(LMCacheError):
    """A GPU or its driver did not do what it was asked for."""


class HandoverError(LMCacheError):
    """The processes of one engine could not agree on a shared slab."""


class ServiceError(LMCacheError):
    """The cache server cannot be reached in time, or one side does not understand the other."""


class LateError(ServiceError):
    """The cache server has not answered in time."""


class BackendError(LMCacheError):
    """A storage backend failed; the caller treats the chunk as a miss."""


class BackendClosed(BackendError):
    """The backend was used after `close()`."""


class Unsupported(BackendError):
    """The backend does not declare the capability this call needs."""
