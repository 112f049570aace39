"""The commands that speak HTTP, to real servers and to what stands in for an engine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lmcache.backends.memory import MemoryBackend
from lmcache.cli import http
from lmcache.cli.main import main

ROOT = Path(__file__).parents[2]


def load(name, path):
    """A module of the core's tests, which belong to no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests/core" / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rig = sys.modules.get("rig") or load("rig", "rig.py")
sys.modules.get("house") or load("house", "house.py")
scene = load("scene_of_http", "test_http.py")
CHUNK = rig.CHUNK_TOKENS
PROMPT = rig.tokens(2 * CHUNK)
TEXT = ",".join(map(str, PROMPT))


class Stub:
    """An HTTP server that says what it is told to, and remembers who asked."""

    def __init__(self):
        self.answers = {}
        """By path: status, body and headers, or what to do."""
        self.asked = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.asked.append((self.path, dict(self.headers)))
                answer = stub.answers.get(self.path, (404, b"", {}))
                if callable(answer):
                    answer(self)
                    return
                status, body, headers = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def says(self, path, body=b"", status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers[path] = (status, data, headers)

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def stub():
    made = Stub()
    yield made
    made.close()


@pytest.fixture
def workshop():
    made = rig.Workshop()
    yield made
    made.close()


@pytest.fixture
def house(workshop):
    return scene.OpenHouse(workshop)


@pytest.fixture
def secret_house(workshop):
    return scene.OpenHouse(workshop, token="geheim-ß")


@pytest.fixture
def closed():
    """A URL where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def run(capsys):
    def run(*args):
        with pytest.raises(SystemExit) as end:
            main(args)
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def answer(run):
    def answer(*args):
        code, out, err = run(*args)
        assert (code, err) == (0, "")
        return out

    return answer


@pytest.fixture
def facts(answer):
    return lambda *args: json.loads(answer(*args, "--format", "json"))


@pytest.fixture
def complaint(run):
    """The one line with which a command is refused."""

    def complaint(*args):
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        [line] = err.splitlines()
        return line.removeprefix("lmcache: ")

    return complaint


def url_of(house):
    return f"http://127.0.0.1:{house.http.port}"


def cells(text):
    """The rows of a table of two columns."""
    return dict(re.split(r" {2,}", line) for line in text.splitlines() if line)


class TestPing:
    def test_a_server_that_lives(self, house, answer, facts):
        shown = cells(answer("ping", "--url", url_of(house)))
        assert shown["Status"] == "OK"
        assert float(shown["Round trip time (ms)"]) > 0
        told = facts("ping", "kvcache", "--url", url_of(house))
        assert (told["url"], told["status"]) == (url_of(house), "OK")
        assert told["round_trip_time_ms"] > 0

    def test_nothing_listens(self, closed, run):
        code, out, err = run("ping", "--url", closed)
        assert code == 1
        assert cells(out) == {"Status": "FAIL", "Round trip time (ms)": "none"}
        assert err == f"lmcache: nothing listens at {closed}/healthcheck\n"
        code, out, _ = run("ping", "engine", "--url", closed, "--format", "json")
        assert code == 1
        assert json.loads(out) == {"url": closed, "status": "FAIL", "round_trip_time_ms": None}

    def test_an_engine(self, stub, answer, run):
        stub.says("/health")
        assert cells(answer("ping", "engine", "--url", stub.url))["Status"] == "OK"
        stub.says("/health", status=503)
        code, out, err = run("ping", "engine", "--url", stub.url)
        assert (code, cells(out)["Status"]) == (1, "FAIL")
        assert err == f"lmcache: {stub.url}/health answers 503: Service Unavailable\n"

    def test_no_token_is_needed(self, secret_house, answer):
        assert "OK" in answer("ping", "--url", url_of(secret_house))

    def test_neither_server_nor_engine(self, run):
        code, _, err = run("ping", "cache")
        assert code == 2
        assert "'kvcache', 'engine'" in err


class TestDescribe:
    def test_a_server_without_engines(self, house, answer):
        shown = cells(answer("describe", "--url", url_of(house)))
        assert shown == {
            "Health": "OK",
            "URL": url_of(house),
            "Release": "house",
            "Chunk size": str(CHUNK),
            "L1 capacity (GB)": "0.00",
            "L1 used (GB)": "0.00 (0.0%)",
            "Eviction policy": house.decider.policy_name,
            "Cached chunks": "0",
            "Active leases": "0",
            "Transfer modes": "engine_driven",
            "Tiers": "none",
        }

    def test_a_server_with_an_engine(self, workshop, answer, facts):
        house = scene.OpenHouse(workshop, MemoryBackend(), slots=8)
        engine = scene.Engine(workshop, house, "the-engine")
        engine.store(PROMPT)
        engine.hold(PROMPT, "r")
        text, table = answer("describe", "kvcache", "--url", url_of(house)).split("\n\n")
        shown = cells(text)
        assert shown["L1 used (GB)"] == "0.00 (25.0%)"
        assert (shown["Cached chunks"], shown["Active leases"]) == ("2", "1")
        assert shown["Tiers"] == "t0"
        header, row = (re.split(r" {2,}", line) for line in table.splitlines())
        bytes_per_token = rig.PAGE_BYTES // rig.PAGE_TOKENS
        told = [f"{value}" for value in ("the-engine", 1, CHUNK, bytes_per_token, 0)]
        assert row == told
        assert header == [
            "ENGINE",
            "MOVERS",
            "CHUNK TOKENS",
            "BYTES PER TOKEN",
            "STEPS IN THE AIR",
        ]
        told = facts("describe", "--url", url_of(house))
        assert (told["health"], told["url"]) == ("OK", url_of(house))
        assert told["l1"] == house.get("/status")[1]["l1"]
        assert [tier["name"] for tier in told["tiers"]] == ["t0"]
        assert [engine["name"] for engine in told["engines"]] == ["the-engine"]

    def test_gigabytes_are_of_two_to_the_thirty(self, house, stub, answer):
        status = house.get("/status")[1]
        status["l1"] |= {"capacity_bytes": 8 << 30, "free_bytes": 5 << 30}
        stub.says("/status", status)
        shown = cells(answer("describe", "--url", stub.url))
        assert shown["L1 capacity (GB)"] == "8.00"
        assert shown["L1 used (GB)"] == "3.00 (37.5%)"

    def test_a_tier_that_fails_is_shown(self, house, stub, answer, facts):
        tiers = [{"name": name, "awake": name == "a", "failures_in_a_row": 3} for name in "ab"]
        stub.says("/status", house.get("/status")[1] | {"tiers": tiers})
        shown = cells(answer("describe", "--url", stub.url))
        assert shown["Health"] == "DEGRADED"
        assert shown["Tiers"] == "a, b (left alone after failures)"
        assert facts("describe", "--url", stub.url)["health"] == "DEGRADED"

    @pytest.mark.parametrize("body", [b'{"ok": true}', b"<html>", b"\xff", b"", b"[]"])
    def test_what_is_no_server_of_ours(self, stub, complaint, body):
        stub.says("/status", body)
        message = complaint("describe", "--url", stub.url)
        assert message.startswith(f"{stub.url}/status does not answer as it should")

    def test_an_engine(self, stub, answer, facts):
        models = [{"id": "Qwen/Qwen3-0.6B", "object": "model", "max_model_len": 40960}]
        stub.says("/v1/models", {"object": "list", "data": models})
        stub.says("/health")
        assert cells(answer("describe", "engine", "--url", stub.url)) == {
            "Status": "OK",
            "URL": stub.url,
            "Model": "Qwen/Qwen3-0.6B",
            "Max context": "40960",
        }
        assert facts("describe", "engine", "--url", stub.url) == {
            "status": "OK",
            "url": stub.url,
            "models": [{"id": "Qwen/Qwen3-0.6B", "max_model_len": 40960}],
        }

    def test_an_engine_whose_core_is_dead(self, stub, answer):
        stub.says("/v1/models", {"data": [{"id": "m"}]})
        stub.says("/health", status=503)
        shown = cells(answer("describe", "engine", "--url", stub.url))
        assert (shown["Status"], shown["Max context"]) == ("FAIL", "unknown")

    def test_an_engine_that_wants_a_key_says_so_itself(self, stub, complaint):
        stub.says("/v1/models", {"error": {"message": "no key"}}, status=401)
        message = complaint("describe", "engine", "--url", stub.url)
        assert message == f"{stub.url}/v1/models answers 401: no key"

    def test_nothing_listens(self, closed, complaint):
        message = complaint("describe", "--url", closed)
        assert message == f"nothing listens at {closed}/status"
        assert "nothing listens" in complaint("describe", "engine", "--url", closed)


class TestClear:
    def test_it_says_how_many_chunks(self, workshop, house, answer, facts):
        engine = scene.Engine(workshop, house)
        engine.store(PROMPT)
        assert answer("kvcache", "clear", "--url", url_of(house)) == "Cleared 2 chunks\n"
        assert len(house.decider) == 0
        engine.store(PROMPT)
        told = facts("kvcache", "clear", "--url", url_of(house))
        assert told == {"tier": "l1", "cleared": 2}

    def test_without_the_token_nothing_is_cleared(
        self, workshop, secret_house, complaint, answer, monkeypatch
    ):
        scene.Engine(workshop, secret_house, token="geheim-ß").store(PROMPT)
        arguments = ("kvcache", "clear", "--url", url_of(secret_house))
        message = complaint(*arguments)
        assert "answers 401: this server wants its token" in message
        assert message.endswith("set LMCACHE_TOKEN to it")
        monkeypatch.setenv("LMCACHE_TOKEN", "guess")
        assert complaint(*arguments) == message
        assert len(secret_house.decider) == 2
        monkeypatch.setenv("LMCACHE_TOKEN", "geheim-ß")
        assert answer(*arguments) == "Cleared 2 chunks\n"

    def test_nothing_listens(self, closed, complaint):
        assert "nothing listens" in complaint("kvcache", "clear", "--url", closed)


class TestLookup:
    @pytest.fixture
    def lookup(self, house):
        return ("kvcache", "lookup", "--url", url_of(house))

    @pytest.fixture
    def engine(self, workshop, house):
        made = scene.Engine(workshop, house, "the-engine")
        made.store(PROMPT)
        return made

    def test_a_prompt_that_is_stored(self, engine, lookup, answer, facts):
        assert cells(answer(*lookup, "--tokens", TEXT)) == {
            "Hit tokens": f"{2 * CHUNK} of {2 * CHUNK}",
            "Chunks": "2",
            "First miss": "none",
        }
        told = facts(*lookup, "--tokens", TEXT)
        assert (told["engine"], told["hit_tokens"]) == ("the-engine", 2 * CHUNK)
        assert len(told["chunks"]) == 2

    def test_the_first_miss_is_explained(self, engine, lookup, answer):
        shown = cells(answer(*lookup, "--tokens", TEXT + ",1" * CHUNK))
        assert shown["Hit tokens"] == f"{2 * CHUNK} of {3 * CHUNK}"
        assert shown["First miss"] == "no chunk was ever stored under this key"

    @pytest.mark.parametrize("between", [",", " ", ", ", "\n", " ,\n\t"])
    def test_commas_and_spaces_are_alike(self, engine, lookup, facts, tmp_path, between):
        text = between.join(map(str, PROMPT))
        path = tmp_path / "tokens.txt"
        path.write_text(text + "\n")
        assert facts(*lookup, "--tokens", text)["hit_tokens"] == 2 * CHUNK
        assert facts(*lookup, "--tokens-file", str(path))["hit_tokens"] == 2 * CHUNK

    def test_salt_adapter_and_engine_are_handed_on(self, engine, lookup, facts, complaint):
        engine.store(rig.tokens(CHUNK, 1), salt="s", lora="l")
        tokens = ("--tokens", ",".join(map(str, rig.tokens(CHUNK, 1))))
        assert facts(*lookup, *tokens, "--salt", "s", "--lora", "l")["hit_tokens"] == CHUNK
        assert facts(*lookup, *tokens, "--salt", "l", "--lora", "s")["hit_tokens"] == 0
        assert facts(*lookup, *tokens, "--engine", "the-engine")["engine"] == "the-engine"
        message = complaint(*lookup, *tokens, "--engine", "other")
        assert message.endswith("/lookup answers 404: no engine 'other' is attached")

    @pytest.mark.parametrize("bad", ["x", "-1", "1.5", "4294967296", "0x10", "\u0663", "9" * 5000])
    def test_what_is_no_token_id_is_named(self, complaint, bad):
        message = complaint("kvcache", "lookup", "--tokens", f"1,{bad},2")
        assert message == f"--tokens has {bad!r}, expected ids between 0 and 4294967295"

    def test_files_that_are_of_no_use(self, complaint, tmp_path):
        path = tmp_path / "tokens"
        arguments = ("kvcache", "lookup", "--tokens-file", str(path))
        assert complaint(*arguments).startswith(f"--tokens-file {path} cannot be read: ")
        path.write_bytes(b"\xff")
        assert complaint(*arguments).startswith(f"--tokens-file {path} cannot be read: ")
        path.write_text(" ,\n")
        assert complaint(*arguments) == f"--tokens-file {path} has no token ids"
        path.write_text("1,two")
        assert complaint(*arguments).startswith(f"--tokens-file {path} has 'two'")

    def test_tokens_are_given_once(self, complaint):
        for given in ((), ("--tokens", "1", "--tokens-file", "f")):
            message = complaint("kvcache", "lookup", *given)
            assert message == "say which tokens with either --tokens or --tokens-file"

    def test_a_prompt_that_the_server_refuses(self, lookup, complaint, tmp_path):
        path = tmp_path / "tokens"
        path.write_text("1," * ((1 << 20) + 1))
        message = complaint(*lookup, "--tokens-file", str(path))
        assert "/lookup answers 422: tokens: List should have at most 1048576 items" in message


class TestRequests:
    def test_the_default_urls(self):
        assert http.Remote(http.Target.KVCACHE, None).url == "http://localhost:8080"
        assert http.Remote(http.Target.ENGINE, None).url == "http://localhost:8000"

    def test_a_url_needs_no_scheme_and_may_end_in_a_slash(self, house, answer):
        assert "OK" in answer("ping", "--url", f"localhost:{house.http.port}")
        assert "OK" in answer("ping", "--url", url_of(house) + "/")

    @pytest.mark.parametrize(
        "url",
        [
            "http://",
            "http://:80",
            "http://host:port",
            "http://host:0",
            "http://host:99999",
            "ftp://host",
            "file:///etc/passwd",
            "http://host?a=b",
            "http://host#a",
            "http://[::1",
        ],
    )
    def test_what_is_no_url_is_refused(self, complaint, url):
        message = complaint("ping", "--url", url)
        assert message == f"--url is {url!r}, expected one like http://localhost:8080"

    def test_a_password_in_a_url_is_not_repeated(self, complaint):
        message = complaint("describe", "--url", "http://me:hunter2@host:80")
        assert "hunter2" not in message
        assert message.startswith("--url is 'http://***@host:80'")

    @pytest.mark.parametrize("url", ["http://no such host", "http://" + "a" * 70])
    def test_a_host_that_cannot_be_found(self, complaint, url):
        assert complaint("describe", "--url", url).startswith(f"cannot reach {url}/status: ")

    def test_a_token_that_no_header_can_hold(self, house, complaint, monkeypatch):
        monkeypatch.setenv("LMCACHE_TOKEN", "two\nlines")
        message = complaint("describe", "--url", url_of(house))
        assert message == "LMCACHE_TOKEN has a control character, which HTTP cannot carry"

    def test_the_token_is_for_our_server_alone(self, stub, run, monkeypatch):
        monkeypatch.setenv("LMCACHE_TOKEN", "secret")
        stub.says("/health")
        stub.says("/healthcheck")
        run("ping", "engine", "--url", stub.url)
        run("ping", "kvcache", "--url", stub.url)
        shown = {path: headers.get("Authorization") for path, headers in stub.asked}
        assert shown == {"/health": None, "/healthcheck": "Bearer secret"}

    def test_the_token_follows_no_redirection(self, stub, run, monkeypatch):
        monkeypatch.setenv("LMCACHE_TOKEN", "secret")
        stub.says("/healthcheck", status=302, Location=f"{stub.url}/elsewhere")
        code, _, err = run("ping", "--url", stub.url)
        assert code == 1
        assert "answers 302: Found" in err
        assert [path for path, _ in stub.asked] == ["/healthcheck"]

    def test_no_proxy_is_asked(self, house, closed, answer, monkeypatch):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, closed)
        assert "OK" in answer("ping", "--url", url_of(house))

    def test_a_server_that_says_nothing(self, stub, complaint, monkeypatch):
        monkeypatch.setattr(http, "DEADLINE_S", 0.2)
        done = threading.Event()
        stub.answers["/status"] = lambda _: done.wait(10)
        message = complaint("describe", "--url", stub.url)
        done.set()
        assert message == f"{stub.url}/status does not answer within 0.2 seconds"

    def test_a_server_that_never_ends(self, stub, complaint, monkeypatch):
        monkeypatch.setattr(http, "DEADLINE_S", 0.3)
        done = threading.Event()

        def drip(handler):
            handler.send_response(200)
            handler.end_headers()
            while not done.wait(0.02):
                handler.wfile.write(b" ")

        stub.answers["/status"] = drip
        started = time.monotonic()
        message = complaint("describe", "--url", stub.url)
        done.set()
        assert message == f"{stub.url}/status does not answer within 0.3 seconds"
        assert time.monotonic() - started < 5

    def test_an_answer_that_is_too_long(self, stub, complaint, monkeypatch):
        monkeypatch.setattr(http, "MOST_BYTES", 1000)
        stub.says("/status", b" " * 2000)
        assert complaint("describe", "--url", stub.url).endswith("longer than 1000 bytes")

    def test_a_server_that_speaks_something_else(self, complaint):
        with socket.create_server(("127.0.0.1", 0)) as door:
            url = f"http://127.0.0.1:{door.getsockname()[1]}"

            def greet():
                line, _ = door.accept()
                line.sendall(b"\xff\0\0\0\0\0\0\0\x01\x7f")
                line.close()

            greeter = threading.Thread(target=greet)
            greeter.start()
            message = complaint("describe", "--url", url)
            greeter.join()
        assert message.startswith(f"cannot reach {url}/status: ")

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b'{"detail": "the server is busy"}', "the server is busy"),
            (b'{"detail": [{"loc": ["body", "tier"], "msg": "wrong"}]}', "tier: wrong"),
            (b'{"error": "no such model"}', "no such model"),
            (b"Invalid\nhost header", "Invalid host header"),
            (b"", "Service Unavailable"),
        ],
    )
    def test_what_a_server_says_is_repeated(self, stub, complaint, body, said):
        stub.says("/status", body, status=503)
        assert complaint("describe", "--url", stub.url) == f"{stub.url}/status answers 503: {said}"


class TestCommandLine:
    """In a process of its own, as people run it."""

    @pytest.fixture
    def lmcache(self):
        def lmcache(*args, **env):
            inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
            return subprocess.run(
                [sys.executable, "-W", "error", "-m", "lmcache", *args],
                capture_output=True,
                text=True,
                env=inherited | env,
                cwd=ROOT,
                check=False,
                timeout=60,
            )

        return lmcache

    def test_the_exit_code_tells_whether_a_server_lives(self, lmcache, secret_house, closed):
        assert lmcache("ping", "--url", url_of(secret_house)).returncode == 0
        assert lmcache("ping", "--url", closed).returncode == 1

    def test_the_token_comes_from_the_environment(self, lmcache, secret_house):
        arguments = ("describe", "--url", url_of(secret_house), "--format", "json")
        assert lmcache(*arguments).returncode == 2
        done = lmcache(*arguments, LMCACHE_TOKEN="geheim-ß")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["release"] == "house"

    def test_help_lists_the_commands(self, lmcache):
        text = lmcache("--help").stdout
        for name in ("describe", "kvcache", "ping"):
            assert re.search(rf"\b{name} +[A-Z]", text)
