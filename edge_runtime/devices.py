"""OpenVINO devices: which are there, how they are spelt, and the cores that compile for them."""

from __future__ import annotations

import functools
import os

from edge_runtime.errors import ConfigError, DeviceError
from edge_runtime.light_openvino import ov

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


def describe_devices() -> list[dict[str, str]]:
    """Return name and full name of every device."""
    devices = {name: str(core().get_property(name, "FULL_DEVICE_NAME")) for name in core().available_devices}
    if npuw_runs_on_cpu():
        devices["NPU"] = device_label("NPU")
    return [{"device": device, "name": name} for device, name in devices.items()]
