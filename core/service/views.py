"""What people may see of the service. Called on the thread that serves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from lmcache.core.chain import KeyChain
from lmcache.core.errors import ServiceError
from lmcache.core.keys import Identity, Namespace, root_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.service.service import Service
    from lmcache.core.service.session import Session


def boot(service: Service) -> str:
    """What tells this run of the server from any other."""
    return service.boot.hex()


def clear(service: Service, tier: str) -> dict[str, Any]:
    """Drop every chunk of a tier that nobody holds."""
    return {"tier": tier, "cleared": service.decider.clear()}


def status(service: Service) -> dict[str, Any]:
    """The server, its memory, its tiers and its engines."""
    service.settle()  # who asks often would keep it from doing so in between
    decider = service.decider
    return {
        "release": service.terms.release,
        "boot": service.boot.hex(),
        "chunk_size": service.terms.chunk_size,
        "transfer_modes": list(service.terms.modes),
        "eviction_policy": decider.policy_name,
        "l1": {
            "capacity_bytes": decider.capacity_bytes,
            "free_bytes": decider.free_bytes,
            "chunks": len(decider),
            "leases": len(decider.leases),
        },
        "tiers": service.tiers.describe(),
        "engines": [_engine(session) for session in service.sessions.values()],
        "leaving": [session.about.name for session in service.leaving],
    }


def _engine(session: Session) -> dict[str, Any]:
    geometry = session.attachment.geometry
    return {
        "name": session.about.name,
        "engine": session.about.engine,
        "release": session.about.release,
        "session": f"{session.number:x}",
        "deployment": msgspec.structs.asdict(session.about.deployment),
        "movers": session.about.movers,
        "page_tokens": geometry.page_tokens,
        "chunk_tokens": geometry.chunk_tokens,
        "bytes_per_token": geometry.page_bytes // geometry.page_tokens,
        "layout": geometry.layout.hex(),
        "steps_in_the_air": len(session.attachment.flights),
        "reserved_slots": len(session.reserved),
        "sequences": len(session.sequences),
        "lookups_waiting": len(session.waiting),
    }


def leases(service: Service) -> list[dict[str, Any]]:
    """Every lease, who holds it and for how long."""
    now = time.monotonic()
    with service.decider.lock:
        held = list(service.decider.leases)
    return [
        {
            "lease": lease.number,
            "owner": lease.owner,
            "chunks": len(lease.entries),
            "in_flight": lease.in_flight,
            "seconds_left": None if lease.in_flight else round(lease.deadline - now, 3),
        }
        for lease in held
    ]


def lookup(
    service: Service, *, tokens: Sequence[int], engine: str, lora: str, salt: str
) -> dict[str, Any]:
    """Which chunks of a prompt are in the memory, and why the first that is missing is.

    Nothing is leased. Raises `ServiceError` if it cannot be told which engine is meant.
    """
    session = _meant(service, engine)
    geometry = session.attachment.geometry
    about = msgspec.structs.asdict(session.about.deployment)
    namespace = Namespace(layout=geometry.layout.hex(), **about)
    chain = KeyChain(
        root_key(namespace, Identity(lora=lora, salt=salt)),
        tokens,
        page_tokens=geometry.page_tokens,
        pages_per_chunk=geometry.pages_per_chunk,
    )
    found, reason = service.decider.peek(chain, len(tokens))
    return {
        "engine": session.about.name,
        "tokens": len(tokens),
        "hit_tokens": geometry.tokens_in(found),
        "chunk_tokens": geometry.chunk_tokens,
        "chunks": [{"key": slot.key.hex(), "pages": geometry.pages_of(slot)} for slot in found],
        "reason": reason.name.lower(),
        "meaning": reason.value,
    }


def _keys_of(session: Session) -> tuple[Any, ...]:
    """What engines have in common whose keys are the same."""
    geometry = session.attachment.geometry
    return session.about.deployment, geometry.layout, geometry.chunk_tokens


def _meant(service: Service, name: str) -> Session:
    sessions = list(service.sessions.values())
    chosen = [s for s in sessions if name in ("", s.about.name, s.about.engine)]
    if not chosen:
        raise ServiceError(f"no engine {name!r} is attached" if name else "no engine is attached")
    if len({_keys_of(s) for s in chosen}) > 1:
        # engines may share a name, but no id
        names = ", ".join(sorted({s.about.engine if name else s.about.name for s in chosen}))
        raise ServiceError(f"the engines have keys of their own; name one of: {names}")
    return chosen[0]
