"""What people are told over HTTP, who may ask, and what is refused."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from contextlib import ExitStack

import msgspec
import pytest
import rig
from house import House

from lmcache.backends.memory import MemoryBackend
from lmcache.core.chain import KeyChain
from lmcache.core.engine import moves_for
from lmcache.core.errors import ServiceError
from lmcache.core.keys import Identity, Namespace, root_key
from lmcache.core.metrics import Exporter
from lmcache.core.service import http as service_http
from lmcache.core.service import wire
from lmcache.core.service.client import ServiceClient
from lmcache.core.service.http import HttpServer, build_app
from lmcache.core.tier import Tier
from lmcache.core.tiers import Tiers

CHUNK = rig.CHUNK_TOKENS
JSON = {"Content-Type": "application/json"}
GUARDED = [
    ("GET", "/metrics"),
    ("GET", "/status"),
    ("GET", "/leases"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("POST", "/lookup"),
    ("POST", "/clear"),
]


class OpenHouse(House):
    """A server that people reach, too."""

    def __init__(self, workshop, *backends, slots=32, token="", is_loopback=True):
        decider = workshop.decider(slots, lease_s=60.0)
        tiers = Tiers(decider, [Tier(f"t{i}", backend) for i, backend in enumerate(backends)])
        workshop.later(tiers.close)
        super().__init__(decider, tiers, chunk_size=CHUNK, token=token)
        workshop.later(self.close)
        self.http = HttpServer("127.0.0.1", 0)
        workshop.later(self.http.close)
        self.http.start(build_app(self.server, token=token, is_loopback=is_loopback))
        rig.wait_until(self.answers)

    def answers(self):
        try:
            return self.get("/healthcheck")[0] == 200
        except ConnectionRefusedError:
            return False

    def settle(self):
        """Wait until all that engines have sent on its way has landed."""

        def is_settled(service):
            service.sweep()
            return not any(
                s.reserved or len(s.attachment.flights) for s in service.sessions.values()
            )

        rig.wait_until(lambda: self.server.ask(is_settled))

    def ask(self, method, path, body=None, headers=()):
        """Status and answer, parsed if it is JSON."""
        line = http.client.HTTPConnection("127.0.0.1", self.http.port, timeout=10)
        try:
            line.request(method, path, body, dict(headers))
            answer = line.getresponse()
            text = answer.read().decode()
            is_json = answer.headers.get("content-type") == "application/json"
            return answer.status, json.loads(text) if is_json else text
        finally:
            line.close()

    def get(self, path, **headers):
        return self.ask("GET", path, headers=headers)

    def post(self, path, body, **headers):
        return self.ask("POST", path, json.dumps(body), JSON | headers)

    def lookup(self, tokens, **about):
        return self.post("/lookup", {"tokens": tokens, **about})


class Engine:
    """An engine of one rank, whose keys are made as an adapter makes them."""

    def __init__(self, workshop, house, name="engine", *, width=rig.WIDTH, model="m", token=""):
        self.id = rig.engine_id()
        self.rank = rig.Rank(workshop, self.id, 0, pages=rig.Pages(32, width=width))
        self.deployment = wire.Deployment(model=model, dtype="uint8", parallel="tp1")
        about = wire.Attach(
            release="test",
            engine=self.id,
            name=name,
            movers=1,
            deployment=self.deployment,
            token=token,
        )
        self.client = ServiceClient.open(house.server.endpoint, about, 5.0, patience_s=5.0)
        workshop.later(self.client.close)
        self.house = house

    def chain(self, sequence, **identity):
        geometry = self.client.geometry
        about = msgspec.structs.asdict(self.deployment)
        return KeyChain(
            root_key(Namespace(layout=geometry.layout.hex(), **about), Identity(**identity)),
            sequence,
            page_tokens=geometry.page_tokens,
            pages_per_chunk=geometry.pages_per_chunk,
        )

    def store(self, sequence, **identity):
        chain = self.chain(sequence, **identity)
        slots, _ = self.client.reserve(chain, 0, len(sequence), tail=True)
        number = self.client.depart(slots, [])
        pages = len(sequence) // rig.PAGE_TOKENS
        moves = moves_for(slots, self.client.geometry, range(pages), 0, pages)
        self.rank.mover.store(moves)
        self.rank.mover.publish(moves)
        self.rank.mover.finish(number)
        self.house.settle()

    def hold(self, sequence, owner):
        """Lease a stored sequence."""
        return self.client.lookup(owner, self.chain(sequence), len(sequence))


@pytest.fixture
def build(workshop):
    return lambda *backends, **options: OpenHouse(workshop, *backends, **options)


@pytest.fixture
def house(build):
    return build()


@pytest.fixture
def join(workshop):
    return lambda house, name="engine", **said: Engine(workshop, house, name, **said)


class TestHealth:
    def test_a_process_that_lives_is_healthy(self, house):
        assert house.get("/healthcheck") == (200, {"status": "healthy"})

    def test_ready_is_who_serves_engines(self, house):
        assert house.get("/readyz") == (200, {"status": "ready"})

    def test_a_server_that_is_busy_is_healthy_but_not_ready(self, house, monkeypatch):
        monkeypatch.setattr(service_http, "LOOK_S", 0.2)
        free = threading.Event()
        hog = threading.Thread(target=house.server.ask, args=(lambda _: free.wait(30), 30))
        hog.start()
        try:
            busy = (503, {"detail": "the server is busy"})
            assert house.get("/readyz") == busy
            assert house.get("/status") == busy
            assert house.get("/healthcheck")[0] == 200
        finally:
            free.set()
            hog.join()
        assert house.get("/readyz")[0] == 200


class TestViews:
    def test_metrics_are_for_prometheus(self, workshop, house, join):
        exporter = Exporter("the-house", house.decider, 0)
        workshop.later(exporter.close)
        join(house).store(rig.tokens(3 * CHUNK))
        status, text = house.get("/metrics")
        lines = text.splitlines()
        assert status == 200
        stored = f'lmcache_stored_tokens_total{{engine="the-house",kind=""}} {3 * CHUNK}.0'
        assert stored in lines
        assert 'lmcache_chunks{engine="the-house"} 3.0' in lines

    def test_status_of_an_empty_server(self, house):
        status, told = house.get("/status")
        size = house.decider.capacity_bytes
        assert status == 200
        assert told["release"] == "house"
        assert told["chunk_size"] == CHUNK
        assert told["transfer_modes"] == ["engine_driven"]
        assert told["eviction_policy"] == house.decider.policy_name
        empty = {"capacity_bytes": size, "free_bytes": size, "chunks": 0, "leases": 0}
        assert told["l1"] == empty
        assert told["tiers"] == told["engines"] == told["leaving"] == []

    def test_status_tells_what_is_stored_leased_and_in_the_air(self, house, join):
        engine = join(house, "the-engine")
        engine.store(rig.tokens(2 * CHUNK))
        engine.hold(rig.tokens(2 * CHUNK), "r")
        slots, _ = engine.client.reserve(engine.chain(rig.tokens(CHUNK, 1)), 0, CHUNK, tail=False)
        number = engine.client.depart(slots, [])
        rig.wait_until(lambda: house.get("/status")[1]["engines"][0]["steps_in_the_air"] == 1)
        _, told = house.get("/status")
        assert (told["l1"]["chunks"], told["l1"]["leases"]) == (2, 1)
        assert told["l1"]["free_bytes"] < told["l1"]["capacity_bytes"]
        [about] = told["engines"]
        assert about["name"] == "the-engine"
        assert about["engine"] == engine.id
        assert about["movers"] == 1
        assert about["chunk_tokens"] == CHUNK
        assert about["bytes_per_token"] == rig.PAGE_BYTES // rig.PAGE_TOKENS
        assert about["deployment"]["model"] == "m"
        engine.rank.mover.finish(number)
        house.settle()
        assert house.get("/status")[1]["engines"][0]["steps_in_the_air"] == 0

    def test_status_names_the_tiers(self, build):
        told = build(MemoryBackend(), MemoryBackend()).get("/status")[1]
        assert told["tiers"] == [
            {"name": name, "awake": True, "failures_in_a_row": 0} for name in ("t0", "t1")
        ]

    def test_status_forgets_an_engine_that_left(self, house, join):
        engine = join(house)
        engine.client.close()
        rig.wait_until(lambda: house.get("/status")[1]["engines"] == [])

    def test_a_lease_names_its_owner_until_it_is_released(self, house, join):
        engine = join(house, "the-engine")
        engine.store(rig.tokens(2 * CHUNK))
        hit = engine.hold(rig.tokens(2 * CHUNK), "request-7")
        status, [lease] = house.get("/leases")
        assert status == 200
        name, session, owner = lease["owner"].split("/")
        assert (name, owner) == ("the-engine", "request-7")
        assert session == house.get("/status")[1]["engines"][0]["session"]
        assert (lease["chunks"], lease["in_flight"]) == (2, False)
        assert 0 < lease["seconds_left"] <= 60
        engine.client.release("request-7", hit)
        rig.wait_until(lambda: house.get("/leases") == (200, []))

    def test_a_promised_lease_has_no_deadline(self, house, join):
        engine = join(house)
        engine.store(rig.tokens(CHUNK))
        assert engine.client.keeps(engine.hold(rig.tokens(CHUNK), "r"), promised=True)
        rig.wait_until(lambda: house.get("/leases")[1][0]["in_flight"])
        assert house.get("/leases")[1][0]["seconds_left"] is None


class TestLookup:
    def test_a_prompt_that_is_stored(self, house, join):
        join(house, "the-engine").store(rig.tokens(2 * CHUNK + rig.PAGE_TOKENS))
        status, found = house.lookup(rig.tokens(2 * CHUNK + rig.PAGE_TOKENS))
        assert status == 200
        assert found["engine"] == "the-engine"
        assert found["hit_tokens"] == found["tokens"] == 2 * CHUNK + rig.PAGE_TOKENS
        assert [chunk["pages"] for chunk in found["chunks"]] == [4, 4, 1]
        assert len({chunk["key"] for chunk in found["chunks"]}) == 3
        assert found["reason"] == "none"

    def test_it_leases_nothing(self, house, join):
        join(house).store(rig.tokens(CHUNK))
        assert house.lookup(rig.tokens(CHUNK))[1]["hit_tokens"] == CHUNK
        assert house.get("/leases")[1] == []

    def test_the_first_miss_has_a_reason_in_words(self, house, join):
        join(house).store(rig.tokens(CHUNK))
        _, found = house.lookup(rig.tokens(3 * CHUNK))
        assert (found["hit_tokens"], found["reason"]) == (CHUNK, "never_stored")
        assert found["meaning"] == "no chunk was ever stored under this key"

    def test_what_was_evicted_is_told_from_what_never_was(self, build, join):
        house = build(slots=2)
        engine = join(house)
        for seed in range(3):
            engine.store(rig.tokens(CHUNK, seed))
        assert house.lookup(rig.tokens(CHUNK, 0))[1]["reason"] == "evicted"
        assert house.lookup(rig.tokens(CHUNK, 9))[1]["reason"] == "never_stored"

    def test_a_prompt_of_less_than_a_page(self, house, join):
        join(house)
        assert house.lookup([1])[1]["reason"] == "short"

    def test_salt_and_adapter_are_part_of_the_question(self, house, join):
        engine, sequence = join(house), rig.tokens(CHUNK)
        engine.store(sequence, salt="s", lora="l@1")
        assert house.lookup(sequence, salt="s", lora="l@1")[1]["hit_tokens"] == CHUNK
        for other in ({}, {"salt": "s"}, {"lora": "l@1"}, {"salt": "l@1", "lora": "s"}):
            assert house.lookup(sequence, **other)[1]["hit_tokens"] == 0

    def test_without_an_engine_there_are_no_keys(self, house, join):
        assert house.lookup([1]) == (404, {"detail": "no engine is attached"})
        join(house, "here")
        assert house.lookup([1], engine="there") == (
            404,
            {"detail": "no engine 'there' is attached"},
        )

    def test_engines_that_share_need_no_name(self, house, join):
        first, _ = join(house, "a"), join(house, "b")
        first.store(rig.tokens(CHUNK))
        for name in ("", "a", "b"):
            assert house.lookup(rig.tokens(CHUNK), engine=name)[1]["hit_tokens"] == CHUNK

    @pytest.mark.parametrize("other", [{"width": 2 * rig.WIDTH}, {"model": "other"}])
    def test_engines_that_share_nothing_are_named(self, house, join, other):
        first, _ = join(house, "a"), join(house, "b", **other)
        first.store(rig.tokens(CHUNK))
        assert house.lookup(rig.tokens(CHUNK)) == (
            404,
            {"detail": "the engines have keys of their own; name one of: a, b"},
        )
        assert house.lookup(rig.tokens(CHUNK), engine="a")[1]["hit_tokens"] == CHUNK
        assert house.lookup(rig.tokens(CHUNK), engine="b")[1]["hit_tokens"] == 0

    def test_engines_of_one_name_are_told_apart_by_their_ids(self, house, join):
        engines = [join(house, "same"), join(house, "same", model="other")]
        engines[0].store(rig.tokens(CHUNK))
        status, told = house.lookup(rig.tokens(CHUNK), engine="same")
        assert status == 404
        assert all(engine.id in told["detail"] for engine in engines)
        hits = [house.lookup(rig.tokens(CHUNK), engine=e.id)[1]["hit_tokens"] for e in engines]
        assert hits == [CHUNK, 0]

    @pytest.mark.parametrize(
        ("body", "where"),
        [
            ("{}", "tokens"),
            ('{"tokens": [1, -1]}', 1),
            ('{"tokens": [4294967296]}', 0),
            ('{"tokens": ["x"]}', 0),
            ('{"tokens": [NaN]}', 0),
            ('{"tokens": [1], "salt": "\\ud800"}', "salt"),
            ('{"tokens": [1], "sale": ""}', "sale"),
            ('{"tokens": [1], "\\ud800": ""}', "body"),
        ],
    )
    def test_a_mistake_is_named_and_not_repeated(self, house, join, body, where):
        join(house)
        status, told = house.ask("POST", "/lookup", body, JSON)
        assert status == 422
        [mistake] = told["detail"]
        assert mistake["loc"][-1] == where
        assert "input" not in mistake

    def test_the_largest_token_id_is_one(self, house, join):
        join(house)
        assert house.lookup([0, (1 << 32) - 1])[0] == 200


class TestClear:
    def test_it_drops_what_nobody_holds(self, house, join):
        engine = join(house)
        engine.store(rig.tokens(2 * CHUNK))
        engine.store(rig.tokens(CHUNK, 1))
        engine.hold(rig.tokens(CHUNK, 1), "r")
        assert house.post("/clear", {"tier": "l1"}) == (200, {"tier": "l1", "cleared": 2})
        assert house.lookup(rig.tokens(2 * CHUNK))[1]["hit_tokens"] == 0
        assert house.lookup(rig.tokens(CHUNK, 1))[1]["hit_tokens"] == CHUNK

    @pytest.mark.parametrize(
        ("body", "headers", "status"),
        [
            (None, {}, 415),
            (None, JSON, 422),
            ('{"tier": "l1"}', {}, 415),
            ('{"tier": "l1"}', {"Content-Type": "text/plain"}, 415),
            ("tier=l1", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
            ("[]", JSON, 422),
            ("{", JSON, 422),
            ('{"tier": "l2"}', JSON, 422),
            ('{"tier": "l1", "all": true}', JSON, 422),
        ],
    )
    def test_nothing_is_cleared_but_by_json_that_says_so(self, house, join, body, headers, status):
        join(house).store(rig.tokens(CHUNK))
        assert house.ask("POST", "/clear", body, headers)[0] == status
        assert len(house.decider) == 1

    def test_a_link_clears_nothing(self, house, join):
        join(house).store(rig.tokens(CHUNK))
        assert house.get("/clear")[0] == 405
        assert len(house.decider) == 1


class TestBodies:
    def opening(self, house, *headers):
        """What is answered before any of the body is sent."""
        with socket.create_connection(("127.0.0.1", house.http.port), timeout=5) as line:
            lines = ["POST /lookup HTTP/1.1", "Host: localhost", *headers, "", ""]
            line.sendall("\r\n".join(lines).encode())
            return line.recv(4096).decode().splitlines()[0]

    def test_a_body_that_is_too_long_is_not_awaited(self, house):
        said = self.opening(house, "Content-Type: application/json", "Content-Length: 16777217")
        assert said.startswith("HTTP/1.1 413")

    def test_a_body_of_unknown_length_is_not_awaited(self, house):
        said = self.opening(house, "Content-Type: application/json", "Transfer-Encoding: chunked")
        assert said.startswith("HTTP/1.1 413")

    def test_a_long_prompt_without_the_token_is_told_so(self, build):
        prompt = {"tokens": [1_000_000] * 1_000_000}  # more than sockets hold
        status, told = build(token="secret").post("/lookup", prompt)
        assert (status, told) == (401, {"detail": "this server wants its token as a bearer"})


class TestToken:
    @pytest.mark.parametrize("shown", [None, "", "Bearer ", "Bearer guess", "Basic secret"])
    def test_who_does_not_show_it_is_told_nothing(self, secret_house, shown):
        headers = JSON if shown is None else JSON | {"Authorization": shown}
        refused = (401, {"detail": "this server wants its token as a bearer"})
        for method, path in GUARDED:
            assert secret_house.ask(method, path, "{}", headers) == refused, path

    def test_who_shows_it_is_answered(self, secret_house, join):
        join(secret_house, token="secret")
        headers = JSON | {"Authorization": "Bearer secret"}
        for method, path in GUARDED:
            body = '{"tokens": []}' if path == "/lookup" else "{}"
            assert secret_house.ask(method, path, body, headers)[0] == 200, path

    def test_health_checks_need_none(self, secret_house):
        assert secret_house.get("/healthcheck")[0] == 200
        assert secret_house.get("/readyz")[0] == 200

    def test_a_token_of_any_letters(self, build):
        shown = "Bearer geheim-ß-鍵".encode()  # as curl sends it
        house = build(token="geheim-ß-鍵")
        assert house.get("/status", Authorization=shown)[0] == 200
        assert house.get("/status", Authorization="Bearer geheim-ß")[0] == 401

    @pytest.fixture
    def secret_house(self, build):
        return build(token="secret")


class TestNames:
    def test_this_machine_is_served_under_its_own_names(self, house):
        for host in ("localhost", "localhost:80", "127.0.0.1:80", "[::1]:80"):
            assert house.get("/status", Host=host)[0] == 200, host

    @pytest.mark.parametrize("path", ["/status", "/healthcheck"])
    def test_a_page_under_a_name_of_its_own_is_refused(self, house, path):
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1:80", ""):
            assert house.get(path, Host=host) == (400, "Invalid host header"), host

    def test_a_server_for_other_machines_has_any_name(self, build):
        house = build(is_loopback=False, token="secret")
        shown = {"Host": "cache.example", "Authorization": "Bearer secret"}
        assert house.get("/status", **shown)[0] == 200


def test_the_schema_lists_every_path(house):
    status, schema = house.get("/openapi.json")
    paths = {path: sorted(methods) for path, methods in schema["paths"].items()}
    assert status == 200
    assert paths == {
        "/healthcheck": ["get"],
        "/readyz": ["get"],
        "/metrics": ["get"],
        "/status": ["get"],
        "/leases": ["get"],
        "/lookup": ["post"],
        "/clear": ["post"],
    }
    assert schema["info"] == {"title": "LMCache", "version": "house"}


def test_too_many_at_a_time_are_sent_away(house):
    """And the server is itself again when they have gone."""
    with ExitStack() as stack:
        for _ in range(service_http.MAX_OPEN):
            stack.enter_context(socket.create_connection(("127.0.0.1", house.http.port)))
        rig.wait_until(lambda: house.get("/healthcheck")[0] == 503)
    rig.wait_until(lambda: house.get("/healthcheck")[0] == 200)


def test_a_port_that_is_taken_is_named(house):
    with pytest.raises(ServiceError, match=rf"cannot listen on 127.0.0.1:{house.http.port}: "):
        HttpServer("127.0.0.1", house.http.port)


def test_a_closed_server_answers_nobody(house):
    house.http.close()
    assert not house.answers()
