"""The kernels' sources for compilers and processors other than this machine's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

SOURCES = Path(__file__).resolve().parents[2] / "ov_kernels" / "src"
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-pedantic-errors", f"-I{SOURCES}")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS = {
    "avx2": AVX2,
    "avx2vnni": (*AVX2, "-mavxvnni"),
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
}
OPS = ("block_sparse_attention", "cats_mlp")
UNITS = {f"{op}/{op}_{isa}.cpp": flags for op in OPS for isa, flags in FLAGS.items()}
STANDARD_HEADERS = {
    "cstddef": "#pragma once\n#include <stddef.h>\nnamespace std { using ::size_t; }\n",
    "cstdint": "#pragma once\n#include <stdint.h>\nnamespace std {\n"
    + "".join(f"using ::{sign}int{bits}_t;\n" for sign in ("", "u") for bits in (8, 16, 32, 64))
    + "}\n",
    "cstring": "#pragma once\n#include <cstddef>\nnamespace std {\n"
    'extern "C" void* memcpy(void*, const void*, size_t);\nextern "C" void* memset(void*, int, size_t);\n}\n',
}
ELSEWHERE = """
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#undef __x86_64__
#include "block_sparse_attention/block_sparse_attention_dispatch.cpp"
#include "block_sparse_attention/block_sparse_attention_ref.cpp"
#include "cats_mlp/cats_mlp_dispatch.cpp"
#include "cpu/cpu_features.cpp"
#include "cpu/isa.cpp"

int main() {
    const edge::cats_mlp::Kernels* chosen = reinterpret_cast<const edge::cats_mlp::Kernels*>(1);
    const edge::attention::Kernels* attention = nullptr;
    const bool are_chosen = edge::cats_mlp::choose_kernels(chosen) && edge::attention::choose_kernels(attention);
    return are_chosen && chosen == nullptr && attention == &edge::attention::kernels_ref ? 0 : 1;
}
"""


def said(call: list[str]) -> tuple[int, str]:
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def clang() -> str:
    found = shutil.which("clang++")
    if found is None:
        pytest.skip("there is no clang++")
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_standard_cpp_to_clang(clang: str, unit: str) -> None:
    flags = [*STRICT, *UNITS[unit], "-Wgnu", "-Wvla", "-fsyntax-only"]
    assert said([clang, *flags, str(SOURCES / unit)]) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_units_compile_for_windows(clang: str, unit: str, tmp_path: Path) -> None:
    """As clang-cl reads them: the units include nothing but intrinsics and three headers, small to stand in for."""
    for name, content in STANDARD_HEADERS.items():
        (tmp_path / name).write_text(content)
    own = said([clang, "-print-resource-dir"])[1].strip()
    target = ["--target=x86_64-pc-windows-msvc", "-fms-compatibility-version=19.30", "-ffreestanding", "-nostdinc"]
    folders = ["-isystem", f"{own}/include", "-isystem", str(tmp_path)]
    flags = [*target, *folders, *STRICT, *UNITS[unit], "-fsyntax-only"]
    assert said([clang, *flags, str(SOURCES / unit)]) == (0, "")


def test_other_processors_get_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of another unit left in the dispatch would be an unresolved symbol when the library is loaded."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.delenv("EDGE_KERNELS_ISA", raising=False)
    source, program = tmp_path / "elsewhere.cpp", tmp_path / "elsewhere"
    source.write_text(ELSEWHERE)
    assert said([compiler, "-std=c++17", f"-I{SOURCES}", str(source), "-o", str(program)]) == (0, "")
    assert said([str(program)]) == (0, "")
