"""OpenVINO devices: which are there, and the properties each model is compiled with and why."""

from __future__ import annotations

import functools
import os
from typing import Any

from edge_runtime.config import LoadConfig
from edge_runtime.errors import ConfigError, DeviceError
from edge_runtime.light_openvino import ov

SMALL_MODEL_BYTES = 6 << 20
"""Models below this are faster on one thread: waking a second one costs more than it saves. Measured on 2 cores: 4 MB
of f32 in 5 layers took 272 us a token on one thread, 317 on two; 9 MB of int8 in 6 layers, the embedded target, gave
636 tokens/s on one and 718 on two (`edge-run generate --threads N -K 0 --stats`)."""

ACTIVATION_GROUP_SIZE = 128
"""Activations share one int8 scale in groups of this many where weights are int8 or int4. OpenVINO's default is 32;
128 made the forward of a 1B model 1.1 to 1.4 times faster at int8 and int4, one token or five (2 cores, AVX-512 VNNI).
A group must not exceed the weights' own: twice theirs cost 1.5 to 3 times the time at five tokens."""

NPUW_VARIABLE = "EDGE_NPUW_DEVICES"
"""Environment variable for debugging without an NPU: what would be compiled for it is compiled for this device."""


@functools.cache
def core() -> ov.Core:
    """Return the process's one OpenVINO core."""
    return ov.Core()


def npu_core() -> ov.Core:
    """Return the core that compiles for NPU. Where the CPU stands in, it is one whose CPU computes in f32."""
    if not npuw_runs_on_cpu():
        return core()
    own = ov.Core()
    own.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    return own


def npuw_runs_on_cpu() -> bool:
    """Whether the CPU stands in for the NPU.

    Raises:
        ConfigError: The environment variable that says so names another device.
    """
    chosen = os.environ.get(NPUW_VARIABLE) or "NPU"
    if chosen not in ("NPU", "CPU"):
        raise ConfigError(f"{NPUW_VARIABLE} is {chosen!r}, expected CPU", "unset it to use the NPU itself")
    return chosen == "CPU"


def device_label(device: str) -> str:
    """Return how reports name a device: what stands in for another says so."""
    return "NPU (NPUW on CPU)" if device == "NPU" and npuw_runs_on_cpu() else device


def check_device(device: str) -> str:
    """Return `device` in OpenVINO's spelling.

    Raises:
        DeviceError: There is no such device on this machine.
    """
    name = device.upper()
    if name == "CPU":  # always there; asking OpenVINO would load the plugins of all other devices first
        return name
    if name == "NPU" and npuw_runs_on_cpu():
        return name
    available = core().available_devices
    if name in available or f"{name}.0" in available:
        return name
    raise DeviceError(f"device `{device}` is not on this machine", f"available: {', '.join(available)}")


def num_threads(config: LoadConfig, weight_bytes: int) -> int:
    """Return the CPU threads for a model; 0 leaves the choice to OpenVINO."""
    return config.num_threads or (1 if weight_bytes < SMALL_MODEL_BYTES else 0)


def compile_properties(
    device: str, config: LoadConfig, weight_bytes: int, weight_group_size: int | None
) -> dict[str, Any]:
    """Return the properties that a model is compiled with.

    KV precision is always explicit: exporters write a hidden default into the IR, which would override the plugin's.

    Args:
        device: OpenVINO device.
        config: What the user asked for.
        weight_bytes: Size of the model's weights.
        weight_group_size: Smallest group of int4 weights along the input axis; None where there are no such groups.
    """
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "KV_CACHE_PRECISION": kv_precision(config),
    }
    if config.precision != "auto":
        properties["INFERENCE_PRECISION_HINT"] = config.precision
    if config.cache_dir:
        properties["CACHE_DIR"] = os.fspath(config.cache_dir)
    if device.startswith("CPU"):
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = activation_group_size(config, weight_group_size)
        # By channel, the plugin's default, each token rescales its block of keys, and a rejected draft leaves its trace
        # in the scale. By token, rolling back is exact: speculation leaves what plain decoding leaves.
        properties["KEY_CACHE_QUANT_MODE"] = "BY_TOKEN"
        threads = num_threads(config, weight_bytes)
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
        if threads == 1:
            # Pinned, it runs on the first core, as every other such process does: two of them took 5.3 ms a token and
            # left a core idle; unpinned 2.1 ms, and as much as pinned when alone (benchmarks/processes.py).
            properties["ENABLE_CPU_PINNING"] = False
    return properties


def npu_properties(config: LoadConfig, context_length: int) -> dict[str, Any]:
    """Return the properties that a model is compiled with for NPU, by OpenVINO's NPUW.

    NPUW rounds prompt and response up to multiples of 64 and holds their sum less one step: room for the context.
    `NPUW_DEVICES` is explicit because its default moves to the CPU, without a word, what the NPU cannot run. One size
    of cache (no pyramid), because changing from one to the next fails in a step of several tokens (2026.4.1).

    Raises:
        ConfigError: An option has a value that other devices take and the NPU does not.
    """
    for name in ("precision", "kv_precision"):
        if getattr(config, name) not in ("auto", "f16"):
            raise ConfigError(
                f"{name} is {getattr(config, name)}, but the NPU computes and stores in f16",
                f"leave `{name}` at auto, or run the target on another device",
            )
    chunk, step_tokens = config.prefill_chunk_size, config.npu_step_tokens or 1
    if chunk < step_tokens or chunk & (chunk - 1):
        raise ConfigError(f"prefill_chunk_size is {chunk}, expected a power of two of at least {step_tokens} on NPU")
    properties: dict[str, Any] = {
        "NPU_USE_NPUW": "YES",
        "NPUW_LLM": "YES",
        "NPUW_DEVICES": "CPU" if npuw_runs_on_cpu() else "NPU",
        "NPUW_LLM_MAX_PROMPT_LEN": context_length,
        "NPUW_LLM_MIN_RESPONSE_LEN": step_tokens,
        "NPUW_LLM_MAX_GENERATION_TOKEN_LEN": step_tokens,
        "NPUW_LLM_PREFILL_CHUNK_SIZE": chunk,
        "NPUW_LLM_GENERATE_PYRAMID": "NO",
    }
    if npuw_runs_on_cpu():
        properties["NPUW_F16IC"] = "NO"  # the parts compute in f32 there, and hand it on
    if config.cache_dir:
        properties["CACHE_DIR"] = os.fspath(config.cache_dir)
    return properties


def activation_group_size(config: LoadConfig, weight_group_size: int | None) -> int:
    """Return how many activations share an int8 scale; 0 where they are not rounded.

    The plugin rounds them in another way for one token than for several: verifying a block then differs from plain
    decoding by as much as rounding does (logits by 3 % of their deviation in a 1B model): not where f32 was asked for.
    """
    if config.activation_group_size is not None:
        return config.activation_group_size
    return 0 if config.precision == "f32" else min(ACTIVATION_GROUP_SIZE, weight_group_size or ACTIVATION_GROUP_SIZE)


def kv_precision(config: LoadConfig) -> str:
    """Return the storage type of keys and values: f32 where exactness was asked for, else u8."""
    if config.kv_precision != "auto":
        return config.kv_precision
    return "f32" if config.precision == "f32" else "u8"


def describe_devices() -> list[dict[str, str]]:
    """Return name and full name of every device."""
    devices = {name: str(core().get_property(name, "FULL_DEVICE_NAME")) for name in core().available_devices}
    if npuw_runs_on_cpu():
        devices["NPU"] = device_label("NPU")
    return [{"device": device, "name": name} for device, name in devices.items()]
