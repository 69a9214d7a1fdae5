"""Every option is checked where it is given: a bad value is one line, never a traceback from deep inside."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.config import GenerationConfig, LoadConfig
from edge_runtime.errors import ConfigError

NAN, INF = float("nan"), float("inf")

BAD_GENERATION = {
    "max_new_tokens": [0, -1, 1.5, "5", None, True, NAN, INF],
    "temperature": [-0.1, NAN, INF, "1", None, True],
    "top_k": [-1, 1.5, "3", None, True],
    "top_p": [0, -0.1, 1.1, "0.9", None, NAN],
    "min_p": [-0.1, 1.1, None, NAN],
    "repetition_penalty": [0, -1, NAN, INF, None],
    "presence_penalty": [INF, -INF, NAN, "a", None],
    "frequency_penalty": [INF, NAN, "a", None],
    "logit_bias": [{1: "a"}, {-1: 2.0}, {"a": 1.0}, {1: NAN}, {1: INF}, {1.5: 1.0}, [1], None],
    "seed": ["a", -1, 1.5, True],
    "stop": [5, None, (1, 2), "", ("a", ""), (None,), b"x"],
    "stop_token_ids": ["ab", 5, None, (-1,), (1.5,)],
    "ignore_eos": ["no", 1, None],
    "logprobs": [-1, 1.5, "3", 101, True],
    "num_draft_tokens": [-1, 1.5, "x", None, True, 65],
    "max_draft_tokens": [0, 65, 2.5, None, "8"],
    "lookup": ["yes", 1, None],
}
GOOD_GENERATION = {
    "max_new_tokens": [1, 10**9],
    "temperature": [0, 0.7, np.float32(0.5)],
    "top_k": [0, 5, np.int64(5)],
    "top_p": [1e-9, 1, 0.9],
    "min_p": [0, 1],
    "repetition_penalty": [0.1, 1, 2.5],
    "presence_penalty": [-2, 0, 2.5],
    "frequency_penalty": [-2, 0, 2.5],
    "logit_bias": [{}, {0: -INF, 5: -3}, {np.int64(3): np.float32(1)}],
    "seed": [None, 0, 2**128],
    "stop": [(), "text", ["a", "b"], ("a",)],
    "stop_token_ids": [(), [1, 2]],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 100],
    "num_draft_tokens": ["auto", 0, 64],
    "max_draft_tokens": [1, 64],
    "lookup": [True, False],
}
BAD_LOAD = {
    "device": [None, 5, ""],
    "draft_device": [5, ""],
    "precision": [None, "f64", 32, ["f32"], np.array(["f32"] * 2)],
    "kv_precision": [None, "u2"],
    "activation_group_size": [-1, 1.5, True, "32", 1 << 31],
    "num_threads": [-1, 1.5, None, True, "2", 1 << 31],
    "prefill_chunk_size": [0, 1.5, None],
    "context_length": [0, 1, 2.5, "64", True],
    "npu_step_tokens": [0, 9, 136, 1.5, "8", True],  # NPUW would round 9 up: it would cost what 16 cost
    "mlp": [None, "dense", 1],
    "attention": [None, "paged", 1],
    "cache_dir": [5, True],
    "prefix_cache_bytes": [-1, 1.5, None, "1G"],
    "prefix_cache_dir": [5, True],
    "properties": [
        None,
        ["PERFORMANCE_HINT"],
        {1: 2},
        {"": 1},
        {"PERFORMANCE_HINT": None},
        {"INFERENCE_PRECISION_HINT": "bf16"},
        {"KEY_CACHE_QUANT_MODE": "AUTO"},
        {"DEVICE_PROPERTIES": "{}"},  # OpenVINO's parser never returns
    ],
    "draft_properties": [5, {"CACHE_DIR": "folder"}],
}
GOOD_LOAD = {
    "device": ["CPU", "gpu.1"],
    "draft_device": [None, "NPU"],
    "precision": ["auto", "f32", "bf16", "f16"],
    "kv_precision": ["auto", "f32", "bf16", "f16", "u8", "u4"],
    "activation_group_size": [None, 0, 32],
    "num_threads": [0, 4],
    "prefill_chunk_size": [1, 4096],
    "context_length": [None, 2, 131072],
    "npu_step_tokens": [None, 1, 8, 72],
    "mlp": ["auto", "fused", "stock"],
    "attention": ["auto", "block_sparse", "stock"],
    "cache_dir": [None, "folder", Path("folder")],
    "prefix_cache_bytes": [0, 1 << 33],
    "prefix_cache_dir": [None, "folder", Path("folder")],
    "properties": [{}, {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}],
    "draft_properties": [None, {}, {"NUM_STREAMS": 1}],
}


def cases(table: dict) -> list:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


@pytest.mark.parametrize(
    ("config", "bad", "good"),
    [(GenerationConfig, BAD_GENERATION, GOOD_GENERATION), (LoadConfig, BAD_LOAD, GOOD_LOAD)],
)
def test_every_option_has_its_bad_and_good_values_here(config, bad, good):
    """An option added without a check would otherwise go unnoticed."""
    assert set(bad) == set(good) == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(("name", "value"), cases(BAD_GENERATION))
def test_bad_generation_option_is_refused(name, value):
    """1.5 tokens, a negative seed or a list for a dictionary used to fail later, as TypeError or not at all."""
    assert_refused(GenerationConfig, name, value)


@pytest.mark.parametrize(("name", "value"), cases(BAD_LOAD))
def test_bad_load_option_is_refused(name, value):
    assert_refused(LoadConfig, name, value)


def assert_refused(config, name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_options(**{name: value})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), cases(GOOD_GENERATION))
def test_good_generation_option_is_kept(name, value):
    made = getattr(GenerationConfig.from_options(**{name: value}), name)
    wanted = (value,) if name == "stop" and isinstance(value, str) else value
    assert made == (tuple(wanted) if isinstance(wanted, list) else wanted)


@pytest.mark.parametrize(("name", "value"), cases(GOOD_LOAD))
def test_good_load_option_is_kept(name, value):
    assert getattr(LoadConfig.from_options(**{name: value}), name) == value


@pytest.mark.parametrize("config", [GenerationConfig, LoadConfig])
def test_misspelt_option_suggests_the_nearest(config):
    """nano-vllm ignores unknown keyword arguments."""
    for field in dataclasses.fields(config):
        misspelt = field.name[:-1] + field.name[-1] * 2
        with pytest.raises(ConfigError, match=f"unknown option `{misspelt}`") as caught:
            config.from_options(**{misspelt: 1})
        assert field.name in caught.value.hint


@pytest.mark.parametrize(("name", "hint"), [("temp", "`temperature`"), ("system", "first of the messages")])
def test_option_of_other_libraries_is_told_what_it_is_here(name, hint):
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.from_options(**{name: 1})
    assert hint in caught.value.hint


def test_unknown_option_unlike_any_lists_the_known():
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.from_options(zzz=1)
    assert "max_new_tokens" in caught.value.hint


def test_the_bounds_are_told():
    with pytest.raises(ConfigError, match=r"top_p is 1\.5, expected above 0 and at most 1"):
        GenerationConfig(top_p=1.5)
    with pytest.raises(ConfigError, match="max_new_tokens is 0, expected at least 1"):
        GenerationConfig(max_new_tokens=0)
    with pytest.raises(ConfigError, match="presence_penalty is inf, expected a finite number"):
        GenerationConfig(presence_penalty=INF)


def test_numbers_of_numpy_become_pythons():
    """`logits / np.float64(0.7)` is computed in f64, `logits / 0.7` in f32: the same option gave other answers."""
    config = GenerationConfig(
        temperature=np.float64(0.7),
        top_k=np.int32(5),
        logit_bias={np.int64(3): np.float32(1)},
        stop_token_ids=[np.int8(2)],
    )
    assert type(config.temperature) is float
    assert type(config.top_k) is int
    assert [(type(key), type(value)) for key, value in config.logit_bias.items()] == [(int, float)]
    assert type(config.stop_token_ids[0]) is int
    assert type(LoadConfig(num_threads=np.int64(2)).num_threads) is int


def test_a_config_cannot_be_changed_afterwards():
    """It was checked when it was made."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().temperature = 2.0


def test_properties_reach_the_draft_on_the_same_device_only():
    """Those of a GPU are none of a CPU's."""
    given = {"NUM_STREAMS": 1}
    assert LoadConfig(properties=given).for_draft().properties == given
    assert LoadConfig(properties=given, draft_device="cpu").for_draft().properties == given
    assert LoadConfig(device="GPU", properties=given, draft_device="CPU").for_draft().properties == {}
    own = LoadConfig(device="GPU", draft_device="CPU", draft_properties={"ENABLE_CPU_PINNING": False})
    assert own.for_draft().properties == {"ENABLE_CPU_PINNING": False}


def test_a_property_with_an_option_of_its_own_names_the_option():
    with pytest.raises(ConfigError, match="INFERENCE_NUM_THREADS, which has an option") as caught:
        LoadConfig(properties={"INFERENCE_NUM_THREADS": 1})
    assert caught.value.hint == "set `num_threads` instead"
