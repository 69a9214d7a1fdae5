"""What the tests of all kernels share."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

import ov_kernels

ISAS = ("ref", "avx2", "avx2vnni", "avx512")


def isa_in_use() -> str:
    library = ctypes.CDLL(str(ov_kernels.library_path()))
    library.edge_kernels_isa.restype = ctypes.c_char_p
    return library.edge_kernels_isa().decode()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set of the machine in turn."""
    monkeypatch.setenv("EDGE_KERNELS_ISA", request.param)
    if isa_in_use() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
