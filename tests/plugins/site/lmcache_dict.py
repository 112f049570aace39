import lmcache


class DictBackend(lmcache.StorageBackend):
    """Keeps objects in a dict until it is closed."""

    capabilities = lmcache.Capabilities(removal=False)

    def __init__(self):
        self._objects = {}

    def _opened(self):
        if self._objects is None:
            raise lmcache.BackendClosed("the dict backend is closed")
        return self._objects

    def put(self, key, data):
        self._opened()[key] = bytes(data)
        return True

    def get_into(self, key, out):
        data = self._opened().get(key)
        if data is None or len(data) > out.nbytes:
            return None
        if data:
            out.cast("B")[: len(data)] = data
        return len(data)

    def contains(self, key):
        return key in self._opened()

    def close(self):
        self._objects = None


@lmcache.hookimpl
def lmcache_backends():
    yield lmcache.BackendSpec("dict", lambda _url: DictBackend(), "a dict, until it is closed")
