"""OpenVINO devices: which are there, and the properties each model is compiled with and why."""

from __future__ import annotations

import functools
from typing import Any

import openvino as ov

from edge_runtime.config import LoadConfig
from edge_runtime.errors import DeviceError

SMALL_MODEL_BYTES = 16 << 20
"""Models below this are faster on one thread: waking a second one costs more than it saves (measured: 5 layers of
hidden size 128, 272 us a token on one thread, 317 us on two)."""


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
    available = core().available_devices
    if name in available or f"{name}.0" in available:
        return name
    raise DeviceError(f"device `{device}` is not on this machine", f"available: {', '.join(available)}")


def num_threads(config: LoadConfig, weight_bytes: int) -> int:
    """Return the CPU threads for a model; 0 leaves the choice to OpenVINO."""
    return config.num_threads or (1 if weight_bytes < SMALL_MODEL_BYTES else 0)


def compile_properties(device: str, config: LoadConfig, weight_bytes: int) -> dict[str, Any]:
    """Return the properties that a model is compiled with.

    KV precision is always explicit: exporters write a hidden default into the IR, which would override the plugin's.
    """
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "KV_CACHE_PRECISION": kv_precision(config),
    }
    if config.precision != "auto":
        properties["INFERENCE_PRECISION_HINT"] = config.precision
    if config.cache_dir:
        properties["CACHE_DIR"] = config.cache_dir
    if device.startswith("CPU"):
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
