"""OpenVINO devices: which are there, and the properties each model is compiled with and why."""

from __future__ import annotations

import functools
import os
from typing import Any

import openvino as ov

from edge_runtime.config import LoadConfig
from edge_runtime.errors import DeviceError

SMALL_MODEL_BYTES = 16 << 20
"""Models below this are faster on one thread: waking a second one costs more than it saves (measured: 5 layers of
hidden size 128, 272 us a token on one thread, 317 us on two)."""

ACTIVATION_GROUP_SIZE = 128
"""Activations share one int8 scale in groups of this many where weights are int8 or int4. OpenVINO's default is 32;
128 made the forward of a 1B model 1.1 to 1.4 times faster at int8 and int4, one token or five (2 cores, AVX-512 VNNI).
A group must not exceed the weights' own: twice theirs cost 1.5 to 3 times the time at five tokens."""


@functools.cache
def core() -> ov.Core:
    """Return the process's one OpenVINO core."""
    return ov.Core()


def check_device(device: str) -> str:
    """Return `device` in OpenVINO's spelling.

    Raises:
        DeviceError: There is no such device on this machine.
    """
    name = device.upper()
    if name == "CPU":  # always there; asking OpenVINO would load the plugins of all other devices first
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
        # Only forwards of several tokens round activations to int8: verifying would differ from plain decoding.
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = (
            0 if config.precision == "f32" else min(ACTIVATION_GROUP_SIZE, weight_group_size or ACTIVATION_GROUP_SIZE)
        )
        # By channel, the plugin's default, each token rescales its block of keys, and a rejected draft leaves its trace in
        # the scale. By token, rolling back is exact: speculation leaves what plain decoding leaves.
        properties["KEY_CACHE_QUANT_MODE"] = "BY_TOKEN"
        threads = num_threads(config, weight_bytes)
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
    return properties


def kv_precision(config: LoadConfig) -> str:
    """Return the storage type of keys and values: f32 where exactness was asked for, else u8."""
    if config.kv_precision != "auto":
        return config.kv_precision
    return "f32" if config.precision == "f32" else "u8"


def describe_devices() -> list[dict[str, str]]:
    """Return name and full name of every device."""
    return [
        {"device": name, "name": str(core().get_property(name, "FULL_DEVICE_NAME"))}
        for name in core().available_devices
    ]
