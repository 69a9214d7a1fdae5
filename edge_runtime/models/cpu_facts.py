"""What this computer's CPU can do, as far as it decides how models are compiled."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass

import ov_kernels
from edge_runtime.devices import core

_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables by which oneDNN, OpenVINO's own copy included, is kept from newer instructions."""
_WITHOUT_AMX = {
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX10_1_512",
}


@dataclass(frozen=True, kw_only=True)
class CpuFacts:
    """The facts.

    Attributes:
        has_bf16: Whether OpenVINO can compute in bf16 here.
        may_have_amx: Whether it may use AMX; False only where that is certain.
    """

    has_bf16: bool
    may_have_amx: bool


@functools.cache
def cpu_facts() -> CpuFacts:
    """Return the facts about this computer."""
    has_bf16 = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return CpuFacts(has_bf16=has_bf16, may_have_amx=has_bf16 and _may_have_amx())


def _may_have_amx() -> bool:
    limits = [os.environ[name].upper() for name in _ISA_LIMITS if os.environ.get(name)]
    if platform.machine().lower() not in ("x86_64", "amd64") or any(limit in _WITHOUT_AMX for limit in limits[:1]):
        return False
    return ov_kernels.has_amx() is not False  # without our library nobody can tell
