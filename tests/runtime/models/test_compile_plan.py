"""How `auto` resolves, decided by facts about CPU and weights that are given to it: no test needs such a CPU."""

from __future__ import annotations

import pytest

from edge_runtime.config import LoadConfig
from edge_runtime.errors import ConfigError, DeviceError
from edge_runtime.models.cpu_facts import CpuFacts
from edge_runtime.models.plan import CompilePlan, make_plan
from edge_runtime.models.weights import FLOATS, KINDS, Weights

AVX2 = CpuFacts(has_bf16=False, may_have_amx=False)
BF16 = CpuFacts(has_bf16=True, may_have_amx=False)
AMX = CpuFacts(has_bf16=True, may_have_amx=True)
GROUPS = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


def plan_for(facts: CpuFacts, kind: str, device: str = "CPU", group_size: int | None = None, **options) -> CompilePlan:
    weights = Weights(num_bytes=1 << 30, kind=kind, group_size=group_size, has_floats=kind in FLOATS)
    return make_plan(device, LoadConfig(**options), weights, facts=facts)


def precision(plan: CompilePlan) -> str | None:
    return plan.properties.get("INFERENCE_PRECISION_HINT")


@pytest.mark.parametrize("facts", [BF16, AMX])
@pytest.mark.parametrize(("kind", "group_size", "rounded"), [("int8", None, 128), ("int4", 128, 128), ("int4", 32, 32)])
def test_auto_decodes_quantised_weights_in_f32_with_rounded_activations(facts, kind, group_size, rounded):
    """The plugin's own choice, bf16, decodes half as fast: 10.4 against 20.7 tokens/s of 1 billion int8 weights."""
    plan = plan_for(facts, kind, group_size=group_size)
    assert precision(plan) == "f32"
    assert (plan.properties[GROUPS], plan.properties["KV_CACHE_PRECISION"]) == (rounded, "u8")
    assert plan.reason == f"{kind} weights decode faster so than in bf16"


def test_auto_leaves_sixteen_bit_weights_to_the_plugin_and_f32_weights_exact():
    assert precision(plan_for(AMX, "16-bit")) is None
    assert precision(plan_for(AMX, "f32")) == "f32"


@pytest.mark.parametrize("kind", KINDS)
def test_auto_changes_nothing_on_a_cpu_without_bf16(kind):
    plan = plan_for(AVX2, kind)
    assert precision(plan) is None
    assert plan.reason == "this CPU has no bf16"


@pytest.mark.parametrize("kind", KINDS)
def test_auto_changes_nothing_on_a_gpu(kind):
    plan = plan_for(AMX, kind, device="GPU")
    assert plan.properties == {"PERFORMANCE_HINT": "LATENCY", "KV_CACHE_PRECISION": "u8"}
    assert plan.reason == "the GPU's own choice"


@pytest.mark.parametrize("facts", [AVX2, BF16, AMX])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_wins(facts, kind):
    assert precision(plan_for(facts, kind, precision="bf16")) == "bf16"
    exact = plan_for(facts, kind, precision="f32")
    assert (precision(exact), exact.properties[GROUPS], exact.properties["KV_CACHE_PRECISION"]) == ("f32", 0, "f32")
    own = plan_for(facts, kind, activation_group_size=16, kv_precision="f16", num_threads=3)
    assert (own.properties[GROUPS], own.properties["KV_CACHE_PRECISION"]) == (16, "f16")
    assert (own.num_threads, own.properties["INFERENCE_NUM_THREADS"]) == (3, 3)
    assert plan_for(facts, kind, precision="bf16").reason == "asked for"


def test_a_folder_for_keys_and_values_is_refused_where_it_would_stay_empty(tmp_path):
    """A draft on such a device goes without."""
    with pytest.raises(DeviceError, match="keys and values on NPU cannot be kept in files"):
        plan_for(AVX2, "int8", "NPU", prefix_cache_dir=tmp_path)
    assert LoadConfig(prefix_cache_dir=tmp_path, draft_device="NPU").for_draft().prefix_cache_dir is None
    assert plan_for(AVX2, "int8", prefix_cache_dir=tmp_path / "new").prefix_cache_dir == tmp_path / "new"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"prefix_cache_dir is `.*file`, which cannot be written"):
        plan_for(AVX2, "int8", prefix_cache_dir=tmp_path / "file")
