"""OpenVINO 2026.4.1 must never get what ends the process: bf16, one thread, AMX, and weights of 16 or 32 bits.

No machine with AMX is needed: the facts are given, and the threads that OpenVINO would use are its own answer here.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import openvino as ov
import pytest

import ov_kernels
from edge_runtime.api import EdgeLLM
from edge_runtime.bench import cats
from edge_runtime.cli import devices as cli_devices
from edge_runtime.config import LoadConfig
from edge_runtime.devices import core
from edge_runtime.errors import DeviceError, ExtensionError
from edge_runtime.models import compiling, cpu_facts
from edge_runtime.models.compiling import survivable, threads_for
from edge_runtime.models.cpu_facts import CpuFacts
from edge_runtime.models.loading import read_model
from edge_runtime.models.plan import SMALL_MODEL_BYTES, make_plan
from edge_runtime.models.weights import FLOATS, KINDS, Weights, weights_of

ROOT = Path(__file__).resolve().parents[3]
AMX = CpuFacts(has_bf16=True, may_have_amx=True)
PRECISION, THREADS = "INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS"


@pytest.fixture
def amx(monkeypatch):
    """Let this computer have AMX, and return what OpenVINO is then given to compile CPU models."""
    given: list[dict] = []

    class Recorder:
        def compile_model(self, model, device, properties):
            given.append({"floats": weights_of(model).has_floats, **properties})
            return core().compile_model(model, device, properties)

        def __getattr__(self, name):
            return getattr(core(), name)

    monkeypatch.setattr("edge_runtime.models.plan.cpu_facts", lambda: AMX)
    monkeypatch.setattr(compiling, "cpu_facts", lambda: AMX)
    monkeypatch.setattr(compiling, "core", Recorder)
    return given


@pytest.fixture
def one_core(monkeypatch):
    """Let OpenVINO use one thread whatever it is given, as where the process may use one core."""
    monkeypatch.setattr(compiling, "threads_for", lambda properties: 1)


def is_fatal(properties: dict) -> bool:
    in_bf16 = properties.get(PRECISION, "bf16") == "bf16"
    return properties["floats"] and in_bf16 and threads_for(properties) == 1


def test_one_thread_and_bf16_never_meet_by_themselves(amx, one_core, tiny_ir):
    """SIGFPE in compile_model: exit 136 with nothing printed, for a small model on any thread and any on one core."""
    llm = EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), num_threads=1)
    assert llm.generate("Once", max_new_tokens=3).token_ids
    EdgeLLM.load(tiny_ir("llama"))
    assert len(amx) >= 3
    assert [given for given in amx if is_fatal(given)] == []


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("num_bytes", [1, SMALL_MODEL_BYTES])
@pytest.mark.parametrize("num_threads", [0, 1])
def test_auto_is_f32_where_one_thread_would_be_fatal(one_core, kind, num_bytes, num_threads):
    weights = Weights(num_bytes=num_bytes, kind=kind)
    plan = make_plan("CPU", LoadConfig(num_threads=num_threads), weights, facts=AMX)
    assert plan.properties[PRECISION] == "f32"
    if kind == "16-bit":
        assert plan.reason == "OpenVINO cannot compile these weights in bf16 for one thread on a CPU with AMX"


@pytest.mark.parametrize("kind", FLOATS)
def test_bf16_on_one_thread_is_refused_where_it_is_asked_for(kind):
    weights = Weights(num_bytes=SMALL_MODEL_BYTES, kind=kind)
    with pytest.raises(DeviceError, match="precision is bf16 and num_threads is 1: ") as caught:
        make_plan("CPU", LoadConfig(precision="bf16", num_threads=1), weights, facts=AMX)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_bf16_on_one_core_is_refused_where_it_is_asked_for(one_core):
    for num_bytes in (1, SMALL_MODEL_BYTES):
        with pytest.raises(DeviceError, match="precision is bf16 and OpenVINO computes on one thread here: "):
            make_plan("CPU", LoadConfig(precision="bf16"), Weights(num_bytes=num_bytes, kind="16-bit"), facts=AMX)


def test_a_small_model_takes_the_threads_that_bf16_needs(monkeypatch):
    """A draft beside a target for which bf16 was asked: the single thread was our choice, not the user's."""
    monkeypatch.setattr(compiling, "threads_for", lambda properties: 1 if properties.get(THREADS) == 1 else 2)
    plan = make_plan("CPU", LoadConfig(precision="bf16"), Weights(num_bytes=1, kind="16-bit"), facts=AMX)
    assert (plan.properties[PRECISION], plan.num_threads) == ("bf16", 0)
    assert THREADS not in plan.properties


@pytest.mark.parametrize(
    ("facts", "properties", "has_floats"),
    [
        (AMX, {PRECISION: "bf16", THREADS: 1}, False),
        (AMX, {PRECISION: "f32", THREADS: 1}, True),
        (AMX, {PRECISION: ov.Type.f32, THREADS: 1}, True),
        (CpuFacts(has_bf16=True, may_have_amx=False), {PRECISION: "bf16", THREADS: 1}, True),
        (CpuFacts(has_bf16=False, may_have_amx=False), {THREADS: 1}, True),
    ],
)
def test_what_is_harmless_is_left_alone(facts, properties, has_floats):
    assert survivable(properties, has_floats, facts) is properties


def test_the_type_object_of_bf16_is_seen():
    with pytest.raises(DeviceError):
        survivable({PRECISION: ov.Type.bf16, THREADS: 1}, True, AMX)


def test_threads_are_those_of_one_request():
    assert threads_for({THREADS: 1}) == 1
    assert threads_for({THREADS: 2, "NUM_STREAMS": 2}) == 1


def test_models_compiled_beside_the_main_ones_are_safe_too(amx, one_core):
    """The probe of `edge-run devices` and the layers that benchmarks measure have f32 weights, and no precision."""
    assert cli_devices._choices("CPU")["auto"]["16-bit"]["inference_precision_hint"] == "f32"
    weights = ov.opset13.constant([[1.0] * 8] * 8, ov.Type.f32)
    cats._compiled(lambda x: ov.opset13.matmul(x, weights, False, True).output(0), 8, {})
    assert len(amx) == 2
    assert [given for given in amx if is_fatal(given)] == []


def test_every_model_is_compiled_in_one_place():
    """A call of `compile_model` elsewhere would not be kept from what ends the process."""
    folders = (ROOT / "edge_runtime", ROOT / "export" / "edge_export", ROOT / "benchmarks", ROOT / "tools")
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        methods = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "compile_model"]
        assert not methods or path.name == "compiling.py", f"{path}:{methods[0].lineno} compiles by itself"


def test_without_our_library_amx_is_feared_where_there_is_bf16(monkeypatch):
    def absent(name):
        raise ExtensionError("not installed")

    monkeypatch.setattr(ov_kernels, "exported", absent)
    monkeypatch.setattr(cpu_facts.platform, "machine", lambda: "AMD64")
    for name in cpu_facts._ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert cpu_facts._may_have_amx() is True
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16")
    assert cpu_facts._may_have_amx() is False
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert cpu_facts._may_have_amx() is True
    monkeypatch.setattr(cpu_facts.platform, "machine", lambda: "arm64")
    assert cpu_facts._may_have_amx() is False


@pytest.mark.kernels
def test_the_library_tells_what_the_system_tells():
    flags = Path("/proc/cpuinfo")
    if not flags.is_file():
        pytest.skip("the system does not list the CPU's features")
    assert ov_kernels.has_amx() in (None, "amx_bf16" in flags.read_text())


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_kinds_of_weights_are_read_from_the_graph(tiny_hf, tmp_path, weights):
    from edge_export.convert import export_model

    export_model(tiny_hf("llama"), tmp_path / "ir", weights=weights)
    found = weights_of(*read_model(tmp_path / "ir"))
    wanted = {"fp32": "f32", "bf16": "16-bit", "int8": "int8"}[weights]
    assert (found.kind, found.has_floats) == (wanted, wanted in FLOATS)
    assert found.kind in KINDS
    assert found == dataclasses.replace(found, num_bytes=(tmp_path / "ir" / "openvino_model.bin").stat().st_size)
