"""The copy operations, by the name under which an installation of LMCache is tested.

There is no C in them: on a GPU they are Triton's, elsewhere `memmove`.
"""

from lmcache.core.kernels.operations import gather, scatter, serving_path

__all__ = ["gather", "scatter", "serving_path"]
