from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmcache
from lmcache.cli.config import reference
from lmcache.cli.output import table
from lmcache.core.config_keys import Config

ROOT = Path(__file__).parents[2]
SITE = ROOT / "tests/plugins/site"
COMMANDS = ["backends", "config", "plugins", "version"]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, with no settings but `env`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LMCACHE_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "lmcache", *args],
        capture_output=True,
        text=True,
        env=inherited | env,
        cwd=ROOT,
        check=False,
        timeout=120,
    )


def answer(*args: str, **env: str) -> str:
    done = run(*args, **env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def facts(*args: str, **env: str) -> Any:
    return json.loads(answer(*args, "--format", "json", **env))


def complaint(*args: str, **env: str) -> str:
    """The one line with which a command is refused."""
    done = run(*args, **env)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("lmcache: ")
    return line.removeprefix("lmcache: ")


# what it costs


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import lmcache", id="import"),
        pytest.param("import lmcache.core.config", id="config"),
        pytest.param(
            "import lmcache.plugins.manager as m; m.PluginManager().commands", id="plugins"
        ),
        pytest.param(
            "import contextlib, lmcache.cli.main as m\n"
            "with contextlib.suppress(SystemExit): m.main(['--help'])",
            id="help",
        ),
    ],
)
def test_the_front_door_imports_neither_torch_nor_an_engine(code: str) -> None:
    heavy = ["torch", "triton", "vllm", "sglang", "tensorrt_llm", "transformers"]
    if code == "import lmcache":
        heavy += ["pluggy", "typer", "pydantic", "rich", "numpy", "lmcache.core", "lmcache.plugins"]
    check = (
        f"{code}\nimport sys\nprint([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr == "[]\n"


def test_help_imports_no_command() -> None:
    check = (
        "import contextlib, sys, lmcache.cli.main as m\n"
        "with contextlib.suppress(SystemExit): m.main(['--help'])\n"
        "print([n for n in sys.modules if n.startswith('lmcache.cli.')], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr == "['lmcache.cli.main', 'lmcache.cli.commands']\n"


# help and version


def test_help_lists_every_command_with_a_line_about_it() -> None:
    text = answer("--help")
    for command in COMMANDS:
        assert re.search(rf"\b{command} +[A-Z]", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert f"Usage: lmcache {command}" in answer(command, "--help")


def test_version() -> None:
    assert answer("--version") == answer("version") == f"lmcache {lmcache.__version__}\n"
    assert facts("version")["lmcache"] == lmcache.__version__


def test_an_unknown_command() -> None:
    done = run("plugin")
    assert done.returncode == 2
    assert "No such command 'plugin'" in done.stderr


# config


def test_config_show_says_where_each_value_came_from(tmp_path: Path) -> None:
    path = tmp_path / "lmcache.yaml"
    path.write_text("chunk_size: 128\n")
    env = {"LMCACHE_CONFIG_FILE": str(path), "LMCACHE_L2": "redis://user:hunter2@h,file:///x"}
    shown = facts("config", "show", **env)
    assert list(shown["config"]) == list(Config.model_fields)
    assert shown["config"]["chunk_size"] == {"value": 128, "source": f"{path}:1"}
    assert shown["config"]["l2"] == {
        "value": ["redis://***@h", "file:///x"],
        "source": "environment variable LMCACHE_L2",
    }
    assert shown["config"]["local_cpu"] == {"value": True, "source": "default"}
    lines = [line.split(maxsplit=2) for line in answer("config", "show", **env).splitlines()]
    assert [line[0] for line in lines] == ["KEY", *Config.model_fields]
    assert ["chunk_size", "128", f"{path}:1"] in lines
    assert ["l2", "redis://***@h,file:///x", "environment variable LMCACHE_L2"] in lines
    assert ["remote_url", "none", "default"] in lines


def test_config_show_names_what_is_ignored() -> None:
    done = run("config", "show", "--format", "json", LMCACHE_ENABLE_PD="1")
    assert json.loads(done.stdout)["ignored"] == [
        "enable_pd (environment variable LMCACHE_ENABLE_PD)"
    ]
    assert len(done.stderr.splitlines()) == 1
    assert "enable_pd" in done.stderr


def test_a_wrong_configuration_is_one_line_on_stderr() -> None:
    assert "LMCACHE_CHUNK_SIZE" in complaint("config", "show", LMCACHE_CHUNK_SISE="1")
    message = complaint("config", "show", LMCACHE_REMOTE_URL="user:hunter2")
    assert message.startswith("remote_url is ")


def test_the_reference_of_the_configuration_is_current() -> None:
    path = ROOT / "docs/configuration.md"
    assert path.read_text() == reference(), "run `lmcache config docs > docs/configuration.md`"


def test_the_reference_is_what_is_printed_whatever_is_configured() -> None:
    assert answer("config", "docs", LMCACHE_CHUNK_SIZE="1") == reference()


@pytest.mark.parametrize("key", Config.model_fields)
def test_every_key_is_described_in_one_sentence(key: str) -> None:
    description = Config.model_fields[key].description
    assert description
    assert description[0].isupper()
    assert description.endswith(".")
    assert ". " not in description
    assert f"| `{key}` | " in reference()


# plugins


def test_plugins_lists_plugins_and_what_they_offer() -> None:
    env = {"PYTHONPATH": str(SITE)}
    listed = facts("plugins", **env)
    assert {
        "name": "dict",
        "distribution": "lmcache-dict",
        "version": "0.1",
        "hooks": ["lmcache_backends"],
        "builtin": False,
    } in listed["plugins"]
    assert {
        "name": "dict",
        "scheme": "dict",
        "summary": "a dict, until it is closed",
        "plugin": "dict",
    } in listed["backends"]
    assert [policy["name"] for policy in listed["policies"]] == ["ARC", "LRU", "S3FIFO"]
    assert {command["name"] for command in listed["commands"]} >= set(COMMANDS)
    assert listed.keys() == {"plugins", "backends", "policies", "codecs", "adapters", "commands"}
    text = answer("plugins", **env)
    assert "dict                         lmcache-dict" in text
    for heading in ("PLUGIN", "BACKENDS", "POLICIES", "CODECS", "ADAPTERS", "COMMANDS"):
        assert heading in text


def test_disabled_plugins_are_not_listed() -> None:
    env = {"PYTHONPATH": str(SITE), "LMCACHE_DISABLED_PLUGINS": "dict"}
    assert "dict" not in [plugin["name"] for plugin in facts("plugins", **env)["plugins"]]


def test_a_command_of_a_plugin_runs_and_a_broken_one_is_blamed(tmp_path: Path) -> None:
    (tmp_path / "lmcache_more-2.dist-info").mkdir()
    (tmp_path / "lmcache_more-2.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: lmcache-more\nVersion: 2\n"
    )
    (tmp_path / "lmcache_more-2.dist-info/entry_points.txt").write_text(
        "[lmcache]\nmore = lmcache_more\n"
    )
    (tmp_path / "lmcache_more.py").write_text(
        "import lmcache\n"
        "def greet(name: str = 'you'): print('hello', name)\n"
        "@lmcache.hookimpl\n"
        "def lmcache_commands():\n"
        "    yield lmcache.CommandSpec('greet', lambda: greet, 'Say hello.')\n"
        "    yield lmcache.CommandSpec('broken', lambda: 1 / 0, 'Never works.')\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    assert "Say hello." in answer("--help", **env)
    assert answer("greet", "--name", "me", **env) == "hello me\n"
    message = complaint("broken", **env)
    assert message.startswith("plugin 'more' of lmcache-more 2 cannot load the command broken")
    (tmp_path / "lmcache_more.py").write_text("import no_such_module")
    message = complaint("--help", **env)
    assert "plugin 'more' of lmcache-more 2 cannot be loaded" in message
    assert "no_such_module" in message
    answer("--help", LMCACHE_DISABLED_PLUGINS="more", **env)


# backends


@pytest.mark.parametrize("url", ["memory://", "memory://?codec=zlib&depth=2&write=never"])
def test_a_backend_that_keeps_the_rules(url: str) -> None:
    """With the options of a tier as well: people have the URL of their configuration."""
    checked = facts("backends", "check", url)
    assert (checked["url"], checked["passed"]) == (url, True)
    assert len(checked["rules"]) > 10
    assert {rule["outcome"] for rule in checked["rules"]} <= {"passed", "skipped"}
    assert " passed" in answer("backends", "check", url)


def test_a_backend_that_breaks_a_rule(tmp_path: Path) -> None:
    source = (SITE / "lmcache_dict.py").read_text()
    (tmp_path / "lmcache_dict.py").write_text(source.replace("return True", "return False"))
    for path in SITE.glob("*.dist-info/*"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_text(path.read_text())
    env = {"PYTHONPATH": str(tmp_path)}
    done = run("backends", "check", "dict://", "--format", "json", **env)
    checked = json.loads(done.stdout)
    assert (done.returncode, checked["passed"]) == (1, False)
    failed = [rule for rule in checked["rules"] if rule["outcome"] == "failure"]
    assert failed
    assert all(rule["message"] for rule in failed)


def test_a_backend_nobody_offers() -> None:
    message = complaint("backends", "check", "shelf://user:hunter2@host")
    assert message.startswith("no storage backend 'shelf'; known: file, memory, mooncake, redis")


def test_a_backend_that_does_not_answer_is_one_complaint() -> None:
    message = complaint("backends", "check", "redis://user:hunter2@127.0.0.1:1")
    assert message.startswith("the server at 127.0.0.1:1 failed us")


@pytest.mark.parametrize("missing", ["pytest", "hypothesis"])
def test_checking_a_backend_without_what_it_takes(tmp_path: Path, missing: str) -> None:
    # a finder that does not find it stands in for an installation without it
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
    )
    message = complaint("backends", "check", "memory://", PYTHONPATH=str(tmp_path))
    assert message == f"checking a backend needs {missing}: install lmcache[testing]"


def test_tables_are_aligned() -> None:
    assert table(("A", "LONG"), [("wide", 1), ("x", "")]) == "A     LONG\nwide  1\nx"
