"""A server on a thread of its own, for tests that are its engines."""

from __future__ import annotations

import threading
import time

from lmcache.core.service.server import Server
from lmcache.core.service.service import Terms


class House:
    """A server on a thread of its own."""

    def __init__(self, decider, tiers, *, endpoint="tcp://127.0.0.1:0", **terms):
        offered = {
            "chunk_size": 256,
            "modes": ("engine_driven",),
            "fetch_timeout_s": 2.0,
            "lease_s": 60.0,
            "release": "house",
        }
        self.decider = decider
        self.server = Server(decider, tiers, Terms(**{**offered, **terms}), endpoint)
        self.endpoint = self.server.endpoint
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def close(self):
        self.server.stop()
        self._thread.join()

    def sessions(self):
        return self.server.ask(lambda service: len(service.sessions))

    def idle(self):
        """Whether nothing at all is held."""

        def look(service):
            service.sweep()
            held = [
                session
                for session in [*service.sessions.values(), *service.leaving]
                if session.reserved
                or session.hits
                or session.waiting
                or len(session.attachment.flights)
            ]
            return not held and len(service.decider.leases) == 0

        return self.server.ask(look)

    def wait_idle(self, timeout_s=10.0):
        deadline = time.monotonic() + timeout_s
        while not self.idle():
            assert time.monotonic() < deadline, "something is held"
            time.sleep(0.002)
