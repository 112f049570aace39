"""The rules of the house: what a reviewer would otherwise have to look for in every change.

Linters check the rest; CONTRIBUTING.md gives the reasons. Where a rule has exceptions, each stands
here with its own.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adapters", "backends", "core", "plugins")

MODULE_LINES = 600
MODULE_LINES_ASKED = 400
FUNCTION_LINES = 100
FUNCTION_LINES_ASKED = 60
ABSTRACT_METHODS = 6
HOOKS = 8

PRINTS = {
    "lmcache/cli/": "a command prints its answer",
    "plugins/manager.py": "a trace of the hooks was asked for, and has nowhere else to go",
}
CATCHES_ALL = {
    "adapters/sglang/connector.py": "the wall, where ranks that do not agree would wait for ever",
    "adapters/sglang/mp_connector.py": "likewise",
    "adapters/sglang/unified.py": "likewise",
    "adapters/trtllm/hooks.py": "the wall between us and the engine",
    "adapters/vllm/connector.py": "likewise",
    "adapters/vllm/hooks.py": "likewise",
    "adapters/vllm/mp_connector.py": "likewise",
    "adapters/vllm/outside.py": "a load that failed is reported to the engine, page by page",
    "core/wall.py": "the wall between us and the engine",
    "core/service/server.py": "one engine's trouble must not be every engine's",
    "core/service/service.py": "likewise",
    "core/pool.py": "a thread's error is logged, and kept for whoever asks the future",
    "lmcache/testing/backend_suite/tools.py": "a thread's error is raised by who waits for it",
    "lmcache/testing/backend_suite/watch.py": "likewise",
}
LOGIC_IN_INIT = {
    "lmcache/__init__.py": "names are imported when they are used, so that the front door is light",
    "lmcache/testing/__init__.py": "pytest must hear of the suites before they are imported",
}
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {
    "__import__",
    "compile",
    "eval",
    "exec",
    "np.load",
    "numpy.load",
    "os.system",
    "torch.load",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
}
RECORDS = {"ABC", "BaseModel", "Enum", "NamedTuple", "Protocol", "Struct"}
"""Bases that leave their heirs nothing to override."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST)


@cache
def sources() -> dict[str, ast.Module]:
    """The modules of the package, each under the name of its real place."""
    trees = {}
    for room in (*ROOMS, "lmcache"):
        for folder, _, names in os.walk(ROOT / room):
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                trees[path.relative_to(ROOT).as_posix()] = ast.parse(path.read_text("utf-8"))
    return dict(sorted(trees.items()))


def everywhere(kind: type[Node] | UnionType) -> Iterator[tuple[str, Node]]:
    """Every node of a kind in the package, with the place to look for it."""
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield f"{module}:{getattr(node, 'lineno', 1)}", node


def is_excused(place: str, excuses: dict[str, str]) -> bool:
    return place.startswith(tuple(excuses))


def decorators_of(node: Function | ast.ClassDef) -> set[str]:
    """The last name of each decorator, without its arguments."""
    return {
        ast.unparse(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2]
        for d in node.decorator_list
    }


def bases_of(node: ast.ClassDef) -> list[str]:
    """The last name of each base, without its parameters."""
    return [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]


def methods_of(node: ast.ClassDef) -> list[Function]:
    return [member for member in node.body if isinstance(member, Function)]


def expect_none(places: Iterable[str]) -> None:
    found = list(places)
    assert not found, "\n".join(found)  # all of them, which the bare comparison cuts short


# --- sizes


def refuse(sizes: dict[str, int], limit: int, ask: int) -> None:
    """Fail for what is over `limit`, and ask about what is over `ask`."""
    expect_none(f"{place} has {lines} lines" for place, lines in sizes.items() if lines > limit)
    for place, lines in sizes.items():
        if lines > ask:
            warnings.warn(f"{place} has {lines} lines; could it be two?", stacklevel=2)


@pytest.mark.filterwarnings("default")
def test_modules_are_short():
    sizes = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in sources()}
    refuse(sizes, MODULE_LINES, MODULE_LINES_ASKED)


@pytest.mark.filterwarnings("default")
def test_functions_are_short():
    sizes = {
        f"{place} {node.name}": node.end_lineno - node.lineno + 1
        for place, node in everywhere(Function)
        if "jit" not in decorators_of(node)
    }
    refuse(sizes, FUNCTION_LINES, FUNCTION_LINES_ASKED)


def test_an_interface_asks_for_little():
    expect_none(
        f"{place} {node.name}"
        for place, node in everywhere(ast.ClassDef)
        if sum("abstractmethod" in decorators_of(m) for m in methods_of(node)) > ABSTRACT_METHODS
    )


def test_there_are_few_hooks():
    hooks = [place for place, node in everywhere(Function) if "hookspec" in decorators_of(node)]
    assert 0 < len(hooks) <= HOOKS


# --- what every module says, and what none does


def test_every_module_says_what_it_is():
    expect_none(name for name, tree in sources().items() if not ast.get_docstring(tree))


def test_what_is_public_says_what_it_is():
    expect_none(
        f"{module}:{node.lineno} {name}"
        for module, tree in sources().items()
        for name, node in public_parts(tree)
        if not ast.get_docstring(node)
    )


def public_parts(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions, classes and methods, less what is described elsewhere."""
    for node in tree.body:
        if isinstance(node, Function) and needs_docstring(node):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for method in methods_of(node):
                if needs_docstring(method) and not overrides(node, method.name):
                    yield f"{node.name}.{method.name}", method


def needs_docstring(node: Function) -> bool:
    """Hooks are described where they are specified, and a rule of a suite by its name."""
    hidden = node.name.startswith(("_", "pytest_", "test_"))
    return not hidden and not {"fixture", "hookimpl", "overload", "setter"} & decorators_of(node)


def overrides(node: ast.ClassDef, name: str) -> bool:
    """Whether a base of the class has the method. A base that is not ours may have any."""
    for base in bases_of(node):
        ours = classes().get(base)
        if ours is None and base not in RECORDS:
            return True
        if ours and (name in {m.name for m in methods_of(ours)} or overrides(ours, name)):
            return True
    return False


@cache
def classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for _, node in everywhere(ast.ClassDef)}


def test_only_commands_print():
    expect_none(
        place
        for place, node in everywhere(ast.Call)
        if ast.unparse(node.func) == "print" and not is_excused(place, PRINTS)
    )


def test_what_goes_wrong_is_named():
    """`except Exception` hides mistakes of ours, unless it raises another error."""
    expect_none(
        place
        for place, node in everywhere(ast.ExceptHandler)
        if catches_all(node)
        and not isinstance(node.body[-1], ast.Raise)
        and not is_excused(place, CATCHES_ALL)
    )


def catches_all(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    named = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return bool({"Exception", "BaseException"} & {ast.unparse(name) for name in named})


def test_nothing_is_unpickled_or_evaluated():
    imported = [(place, {alias.name for alias in n.names}) for place, n in everywhere(ast.Import)]
    imported += [(place, {n.module or ""}) for place, n in everywhere(ast.ImportFrom)]
    expect_none(
        place for place, names in imported if {n.partition(".")[0] for n in names} & UNSAFE_MODULES
    )
    expect_none(
        place for place, node in everywhere(ast.Call) if ast.unparse(node.func) in UNSAFE_CALLS
    )


def test_an_init_has_no_logic():
    expect_none(
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        if module.endswith("__init__.py") and not is_excused(module, LOGIC_IN_INIT)
        for node in tree.body
        if not is_declaration(node)
    )


def is_declaration(node: ast.stmt) -> bool:
    """Docstrings, imports, constants, what a hook offers, and interfaces."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign() | ast.AnnAssign() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.FunctionDef():
            return "hookimpl" in decorators_of(node)
        case ast.ClassDef():
            return "ABC" in bases_of(node)
    return False


# --- how the package is put together


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_linked_into_the_package(room):
    link = ROOT / "lmcache" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..", room)


def test_a_wheel_has_every_folder():
    setuptools = pytest.importorskip("setuptools")
    found = setuptools.find_packages(str(ROOT), include=["lmcache*"])
    walk = os.walk(ROOT / "lmcache", followlinks=True)
    folders = [Path(folder) for folder, _, names in walk if any(n.endswith(".py") for n in names)]
    assert sorted(found) == sorted(".".join(f.relative_to(ROOT).parts) for f in folders)


def test_documents_are_about_no_machine():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    home = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work)/\S*")
    assert documents
    expect_none(
        f"{path.name}: {found}"
        for path in documents
        for found in home.findall(path.read_text("utf-8"))
    )
