"""The dependency rules, read from the source of every module.

    edge_apps → edge_runtime ← edge_export        and both halves may use ov_kernels
    api → text → decoding → models.base ← models  within edge_runtime

A module-level import is one that importing the module runs: anything outside a function. Imports for type checkers
count too, since a name that only a checker sees is a dependency all the same; but for subcommands.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "edge_runtime": ROOT / "edge_runtime",
    "edge_export": ROOT / "export" / "edge_export",
    "edge_apps": ROOT / "apps" / "edge_apps",
    "ov_kernels": ROOT / "ov_kernels",
}
FORBIDDEN = {
    "edge_runtime": {"edge_export", "edge_apps"},
    "edge_export": {"edge_apps"},
    "edge_apps": {"edge_export"},
    "ov_kernels": {"edge_export", "edge_apps"},
}
TRAINING_STACK = {"torch", "transformers", "optimum", "nncf", "onnx", "accelerate"}
# What running a model takes; the libraries of the command line and the hub are imported where they are used.
RUNTIME_LIBRARIES = {"openvino", "numpy", "tokenizers", "jinja2"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the top-level packages that the given nodes import by absolute name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def module_level(node: ast.AST, *, for_checkers: bool = True) -> Iterator[ast.AST]:
    """Yield what importing the module runs and, if asked for, what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not for_checkers:
            continue
        yield child
        yield from module_level(child, for_checkers=for_checkers)


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def dotted_name(package: str, path: Path) -> str:
    names = [package, *path.relative_to(PACKAGES[package]).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


NAMES = {dotted_name(package, path): path for package in PACKAGES for path in modules(package)}


def imported_modules(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the modules that the given nodes import: ours by their full names, others as they are written."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES.keys()
            names |= parts if len(parts) == len(node.names) else {node.module, *parts}
    return names


ALL_MODULES = [pytest.param(name, path, id=str(path.relative_to(ROOT))) for name in PACKAGES for path in modules(name)]
RUNTIME_MODULES = modules("edge_runtime")


@pytest.mark.parametrize(("package", "path"), ALL_MODULES)
def test_module_level_imports_follow_the_dependency_rule(package: str, path: Path) -> None:
    # A subcommand imports its half inside its function, so what its type checker sees is no new dependency.
    is_subcommand = PACKAGES["edge_runtime"] / "cli" in path.parents
    broken = imported_names(module_level(parse(path), for_checkers=not is_subcommand)) & FORBIDDEN[package]
    assert not broken, f"{path} imports {sorted(broken)}"


@pytest.mark.parametrize("path", RUNTIME_MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_runtime_never_imports_the_training_stack(path: Path) -> None:
    """Not even inside a function: a machine that only runs models has none of it."""
    broken = imported_names(ast.walk(parse(path))) & TRAINING_STACK
    assert not broken, f"{path} imports {sorted(broken)}"


@pytest.mark.parametrize(
    "path",
    [path for path in RUNTIME_MODULES if PACKAGES["edge_runtime"] / "cli" not in path.parents],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_runtime_loads_only_what_running_a_model_takes(path: Path) -> None:
    allowed = RUNTIME_LIBRARIES | {"edge_runtime", "ov_kernels"} | sys.stdlib_module_names
    broken = imported_names(module_level(parse(path), for_checkers=False)) - allowed
    assert not broken, f"{path} imports {sorted(broken)} when it is imported"


OPENVINO = r"openvino|ov_kernels|edge_runtime\.(devices|light_openvino)"
FORBIDDEN_WITHIN = {
    # Requests, drafts and pacing are tested without a model: all that they know of one is its interface.
    "edge_runtime.decoding": OPENVINO + r"|edge_runtime\.(text|api)|edge_runtime\.models(?!\.base$)",
    "edge_runtime.models": r"edge_runtime\.(decoding|text|api)",
    "edge_runtime.text": OPENVINO + r"|edge_runtime\.(models|api)",
}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(tuple(FORBIDDEN_WITHIN))])
def test_rooms_of_the_runtime_depend_in_one_direction(name: str) -> None:
    """Not even inside a function."""
    forbidden = next(rule for room, rule in FORBIDDEN_WITHIN.items() if name.startswith(room))
    broken = {other for other in imported_modules(ast.walk(parse(NAMES[name]))) if re.match(forbidden, other)}
    assert not broken, f"{name} imports {sorted(broken)}"


def test_no_module_depends_on_one_that_depends_on_it() -> None:
    """Nor for its types alone: two modules that need each other are one, or lack a third."""
    imports = {name: imported_modules(module_level(parse(path))) for name, path in NAMES.items()}
    ours = {name: (others & NAMES.keys()) - {name} for name, others in imports.items()}
    try:
        graphlib.TopologicalSorter(ours).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_rule_sees_what_it_must() -> None:
    """The walker itself: a class body and a `try` are module level, a function is not."""
    source = """
class A:
    import a
try:
    import b.c
except X:
    from d.e import f
def g():
    import h
from . import i
if TYPE_CHECKING:
    import j
"""
    assert imported_names(module_level(ast.parse(source))) == {"a", "b", "d", "j"}
    assert imported_names(module_level(ast.parse(source), for_checkers=False)) == {"a", "b", "d"}
    source = "from edge_runtime.models import base\nfrom edge_runtime.config import LoadConfig\nimport x.y"
    assert imported_modules(ast.walk(ast.parse(source))) == {"edge_runtime.models.base", "edge_runtime.config", "x.y"}


def test_no_entry_of_a_docstring_is_a_fragment():
    """An entry must make sense where a search shows only its line: `seed: Of the order.` does not."""
    fragment = re.compile(r"^\s+[\w*]+: (Of |The same\b|To [a-z]+\.|Peak\.)|^\s*\"\"\"Of ", re.MULTILINE)
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            found = fragment.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found[0].strip()}"
