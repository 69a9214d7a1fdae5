"""Versions, the compiled library, what an import loads, and that no test and no module is forgotten.

OpenVINO's C++ interface changes with every release and its library's name says which (`libopenvino.so.2641`), so the
release stands in three places that only a test can hold together.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import openvino
import pytest

import edge_runtime
import ov_kernels

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TREE = re.compile(r"<!-- tree -->\s*```\w*\n(.*?)```", re.DOTALL)

DT_NEEDED, DT_RUNPATH = 1, 29
SHT_DYNAMIC = 6


def dynamic_strings(path: Path) -> dict[int, list[str]]:
    """Read the string entries of a 64-bit little-endian ELF file's dynamic section: tag to strings."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    (sections_at,) = struct.unpack_from("<Q", data, 40)
    entry_size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQII", data, sections_at + i * entry_size) for i in range(count)]
    _, _, _, _, offset, size, strings, _ = next(s for s in sections if s[1] == SHT_DYNAMIC)
    strings_at = sections[strings][4]
    found: dict[int, list[str]] = {DT_NEEDED: [], DT_RUNPATH: []}
    for at in range(offset, offset + size, 16):
        tag, value = struct.unpack_from("<qQ", data, at)
        if tag in found:
            start = strings_at + value
            found[tag].append(data[start : data.index(b"\0", start)].decode())
    return found


def pinned(requirements: list[str]) -> str:
    (requirement,) = [r for r in requirements if re.match(r"openvino\b(?!-)", r)]
    match = re.fullmatch(r"openvino==(\d+\.\d+\.\d+)\.\*", requirement)
    assert match, f"`{requirement}` does not pin one release as `openvino==A.B.C.*`"
    return match[1]


def installed_library() -> Path:
    path = ov_kernels.library_path()
    assert path is not None
    return path


def test_openvino_release_agrees_everywhere() -> None:
    cmake = (ROOT / "ov_kernels" / "CMakeLists.txt").read_text(encoding="utf-8")
    (in_cmake,) = re.findall(r"set\(EDGE_OPENVINO_VERSION ([\d.]+)\)", cmake)
    assert in_cmake == pinned(PYPROJECT["build-system"]["requires"])
    assert in_cmake == pinned(PYPROJECT["project"]["dependencies"])
    assert in_cmake == openvino.__version__.split("-")[0]


def test_our_own_version_agrees_everywhere() -> None:
    assert edge_runtime.__version__ == PYPROJECT["project"]["version"]


@pytest.mark.kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_library_needs_the_installed_openvino() -> None:
    needed = dynamic_strings(installed_library())[DT_NEEDED]
    (soname,) = [name for name in needed if name.startswith("libopenvino.so")]
    assert (Path(openvino.__file__).parent / "libs" / soname).is_file(), f"{soname} is not in the openvino package"
    year, minor, patch = openvino.__version__.split("-")[0].split(".")
    assert soname == f"libopenvino.so.{year[-2:]}{minor}{patch}"


@pytest.mark.kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_library_finds_openvino_wherever_site_packages_lies() -> None:
    assert dynamic_strings(installed_library())[DT_RUNPATH] == ["$ORIGIN/../../openvino/libs"]


@pytest.mark.kernels
@pytest.mark.skipif(sys.platform == "win32", reason="MSVC has no prefix map")
def test_library_does_not_tell_where_it_was_built() -> None:
    """The text of a C++ check names its source file."""
    content = installed_library().read_bytes()
    assert b"ov_kernels/src/threshold/threshold_op.cpp" in content
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


def installed_files() -> list[str]:
    """Return the files that pip installed, or skip where the project is not installed or runs from the checkout."""
    try:
        files = importlib.metadata.files("edge-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("edge-runtime is not installed")
    names = [file.as_posix() for file in files]
    if "edge_runtime/__init__.py" not in names:
        pytest.skip("an editable install")
    return names


def test_wheel_holds_every_module_the_embedded_pair_and_no_cpp() -> None:
    installed = set(installed_files())
    expected = set()
    for name, folder in PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"].items():
        expected |= {f"{name}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    demo = ROOT / "edge_runtime" / "demo"
    expected |= {
        path.relative_to(ROOT).as_posix() for path in demo.rglob("*") if path.suffix in (".xml", ".bin", ".json")
    }
    assert expected <= installed, f"missing: {sorted(expected - installed)}"
    assert not [name for name in installed if name.endswith((".cpp", ".hpp", "CMakeLists.txt"))]


def test_importing_the_runtime_loads_nothing_of_the_training_half() -> None:
    """Every module of it, in a fresh interpreter: torch alone would cost seconds and hundreds of MB."""
    script = """
import importlib, json, pkgutil, sys
import edge_runtime
for module in pkgutil.walk_packages(edge_runtime.__path__, "edge_runtime."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "edge_runtime" in loaded
    assert not loaded & {"torch", "transformers", "nncf", "optimum", "onnx", "edge_export", "edge_apps"}


def defined_tests(path: Path) -> list[str]:
    """Return the names that pytest collects from a file."""
    tests = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test") else [node]
        tests += [n.name for n in inside if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    return tests


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_every_test_file_is_collected_and_holds_a_test(path: Path) -> None:
    """A test under a name that pytest does not collect, or a `test_` file without tests, passes by never running."""
    assert bool(defined_tests(path)) == path.name.startswith("test_"), f"{path}: {defined_tests(path)}"


def documented_tree() -> str:
    page = ROOT / "docs" / "architecture.md"
    match = TREE.search(page.read_text(encoding="utf-8")) if page.is_file() else None
    if match is None:
        pytest.skip("no docs/architecture.md with a fenced block after `<!-- tree -->`")
    return match[1]


def test_documented_tree_lists_every_module_of_the_runtime() -> None:
    """By file name; a folder of its own by its name and a slash."""
    tree = documented_tree()
    runtime = ROOT / "edge_runtime"
    names = {path.name for path in runtime.glob("*.py")} - {"__init__.py", "__main__.py"}
    names |= {f"{path.parent.name}/" for path in runtime.glob("*/__init__.py")}
    missing = sorted(name for name in names if not re.search(rf"(?<![\w/]){re.escape(name)}(?!\w)", tree))
    assert not missing, f"the tree of docs/architecture.md lacks {missing}"


def test_documented_tree_names_nothing_that_is_gone() -> None:
    named = set(re.findall(r"[\w/]*\w\.py\b", documented_tree()))
    present = {
        path.name
        for folder in ("edge_runtime", "export", "ov_kernels", "apps", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {Path(name).name for name in named} - present
