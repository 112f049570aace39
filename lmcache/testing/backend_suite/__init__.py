"""The contract of `StorageBackend`, as tests anyone can run: one module of rules per theme.

suite       what a subclass provides, and what every rule is given
objects     what is put is got
names       keys, and whether there is something under them
promises    what `Capabilities` says, and what closing means
threads     many at once
processes   other processes, and what is left of those that are killed
history     whatever is done, in whatever order
watch       no call hangs
"""

from lmcache.testing.backend_suite.history import BackendStateMachine
from lmcache.testing.backend_suite.suite import BackendSuite

__all__ = ["BackendStateMachine", "BackendSuite"]
