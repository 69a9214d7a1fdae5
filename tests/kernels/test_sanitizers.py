"""The kernels under address and undefined-behaviour sanitizers, on random shapes, blobs and odd addresses.

More rounds, by hand, with the program that the test leaves in pytest's temporary folder: `fuzz SEED ROUNDS`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

SOURCES = Path(__file__).resolve().parents[2] / "ov_kernels" / "src"
DRIVERS = Path(__file__).parent / "cpp"
ROUNDS = {"cats_mlp": "40", "block_sparse_attention": "60"}
SANITIZERS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMMON = ("-std=c++17", "-Wall", "-Wextra", f"-I{SOURCES}", "-ffp-contract=off", "-DEMULATE_AVX_VNNI")
VECTORS = ("-mavx2", "-mfma", "-mf16c", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
UNITS = {
    "cats_mlp/cats_mlp_layout.cpp": (),
    "cats_mlp/cats_mlp_ref.cpp": (),
    "cpu/cpu_features.cpp": (),
    "block_sparse_attention/block_sparse_attention_dispatch.cpp": (),
    "block_sparse_attention/block_sparse_attention_ref.cpp": (),
    "block_sparse_attention/plan.cpp": (),
    "cpu/isa.cpp": (),
    "block_sparse_attention/block_sparse_attention_avx2.cpp": VECTORS,
    "block_sparse_attention/block_sparse_attention_avx2vnni.cpp": VECTORS,
    "block_sparse_attention/block_sparse_attention_avx512.cpp": (*VECTORS, *AVX512),
    "cats_mlp/cats_mlp_avx2.cpp": VECTORS,
    "cats_mlp/cats_mlp_avx2vnni.cpp": VECTORS,
    "cats_mlp/cats_mlp_avx512.cpp": (*VECTORS, *AVX512),
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """$CXX, else clang, which takes 40 s of CPU for the sanitized units where gcc 12 takes 160 s."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["clang++", "g++"]
    found = next((path for path in map(shutil.which, names) if path and has_sanitizers(path, tmp_path_factory)), None)
    if found is None:
        pytest.skip("there is no C++ compiler with sanitizers")
    return found


def has_sanitizers(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Tell whether programs link: Debian's clang comes without the libraries."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "empty.cpp").write_text("int main() {}")
    call = [compiler, *SANITIZERS, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    return subprocess.run(call, check=False, capture_output=True).returncode == 0


def sanitizers_of(compiler: str, unit: str) -> tuple[str, ...]:
    """Return the flags for one unit: clang compiles the kernels soonest without optimiser, gcc with."""
    if "clang" not in Path(compiler).name:
        return (*SANITIZERS, "-O1")
    level = "-O0" if UNITS.get(unit) else "-O1"
    return (*SANITIZERS, "-fno-sanitize=function", level)  # `function` adds weak names of types


@pytest.fixture(scope="module")
def objects(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The op's units, each compiled with the sanitizers."""
    folder = tmp_path_factory.mktemp("objects")
    made = {unit: folder / (Path(unit).stem + ".o") for unit in UNITS}
    calls = [
        [compiler, *COMMON, *sanitizers_of(compiler, unit), *flags, "-c", str(SOURCES / unit), "-o", str(made[unit])]
        for unit, flags in UNITS.items()
    ]
    running = [subprocess.Popen(call, stderr=subprocess.PIPE, text=True) for call in calls]
    for process in running:
        _, said = process.communicate()
        assert (process.returncode, said) == (0, "")
    return made


@pytest.mark.parametrize("op", ROUNDS)
def test_sanitizers_find_nothing(compiler: str, objects: dict[str, Path], tmp_path: Path, op: str) -> None:
    program = tmp_path / "fuzz"
    link = [
        compiler,
        *COMMON,
        *sanitizers_of(compiler, "driver"),
        str(DRIVERS / f"fuzz_{op}.cpp"),
        *map(str, objects.values()),
        "-o",
        str(program),
    ]
    subprocess.run(link, check=True)
    done = subprocess.run([str(program), "1", ROUNDS[op]], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_units_of_one_instruction_set_share_no_code(objects: dict[str, Path]) -> None:
    """A function that two units share could be taken from the one that this CPU cannot run."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    for unit, flags in UNITS.items():
        if flags:
            call = ["nm", "-Cg", "--defined-only", str(objects[unit])]
            listed = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            names = [line.split(maxsplit=2)[2] for line in listed.splitlines()]
            isa = Path(unit).stem.rpartition("_")[2]
            own = f"edge::{'cats_mlp' if unit.startswith('cats') else 'attention'}::kernels_{isa}"
            assert [name for name in names if not name.startswith(("__odr_asan", "DW.ref."))] == [own]
