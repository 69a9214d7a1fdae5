"""The one place that compiles models, and what it keeps from OpenVINO's CPU plugin.

OpenVINO 2026.4.1 divides by zero, which ends the process without a word, when it compiles a matrix of 16-bit or 32-bit
weights for a CPU with AMX, in bf16 arithmetic and for one thread (openvino#33300). Two threads, f32, or instructions
without AMX compile well. What nobody asked for is changed to f32 here; what somebody asked for is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_runtime.devices import core
from edge_runtime.errors import DeviceError
from edge_runtime.light_openvino import ov
from edge_runtime.models.cpu_facts import CpuFacts, cpu_facts
from edge_runtime.models.passes.paged_attention import first_line
from edge_runtime.models.weights import weights_of

PRECISION, THREADS = "INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS"
_THREADING = (
    THREADS,
    "NUM_STREAMS",
    "PERFORMANCE_HINT",
    "PERFORMANCE_HINT_NUM_REQUESTS",
    "SCHEDULING_CORE_TYPE",
    "ENABLE_HYPER_THREADING",
)
"""Properties that decide how many threads compute one request."""


def compile_model(
    model: ov.Model, device: str, properties: dict[str, Any], own_core: ov.Core | None = None
) -> ov.CompiledModel:
    """Compile a model.

    Args:
        model: Any graph.
        device: OpenVINO device.
        properties: What OpenVINO is given, but for arithmetic in which it would end the process.
        own_core: The core that compiles; None for the process's.

    Raises:
        DeviceError: bf16 was asked for where OpenVINO would end the process.
        RuntimeError: OpenVINO refuses.
    """
    if device.startswith("CPU") and cpu_facts().may_have_amx:
        properties = survivable(properties, weights_of(model).has_floats)
    return (own_core or core()).compile_model(model, device, properties)


def check_added_properties(error: RuntimeError, device: str, asked: dict[str, Any]) -> None:
    """Raise DeviceError where OpenVINO failed over a property that the user added.

    Args:
        error: What OpenVINO raised.
        device: OpenVINO device.
        asked: Options that may be the reason, by name, added properties among them: see `CompilePlan`.
    """
    added = asked.get("properties", {})
    only = next(iter(added)) if len(added) == len(asked) == 1 else None
    named = next((name for name in added if name in str(error)), only)
    if named is not None:
        raise DeviceError(
            f"{device} refuses property {named}={added[named]}: {first_line(error)}",
            "correct its name or value, or leave it out",
        ) from error


def survivable(properties: dict[str, Any], has_floats: bool, facts: CpuFacts | None = None) -> dict[str, Any]:
    """Return properties with which OpenVINO's CPU plugin compiles a model and lives.

    Args:
        properties: What it is to be given.
        has_floats: Whether the model has matrices of 16-bit or 32-bit weights.
        facts: About the CPU; None for this computer's.

    Raises:
        DeviceError: bf16 was asked for, and it would not.
    """
    facts = facts or cpu_facts()
    asked = _name(properties.get(PRECISION))
    if not (facts.may_have_amx and has_floats and asked in (None, "bf16")) or threads_for(properties) > 1:
        return properties
    if asked is None:
        return {**properties, PRECISION: "f32"}
    threads = "num_threads is 1" if properties.get(THREADS) == 1 else "OpenVINO computes on one thread here"
    raise DeviceError(
        f"precision is bf16 and {threads}: on a CPU with AMX, OpenVINO 2026.4.1 cannot compile 16-bit or 32-bit "
        "weights that way",
        "leave `precision` at auto, or use two threads where there are two cores",
    )


def threads_for(properties: dict[str, Any]) -> int:
    """Return how many threads OpenVINO would use for one request of a model compiled with these properties.

    Only it knows: cores without hyper-threads, of the faster kind, and of those the ones that this process may use.
    """
    tokens = ov.opset13.parameter([1], np.float32)
    threading = {name: properties[name] for name in _THREADING if name in properties}
    probe = ov.Model([ov.opset13.relu(tokens)], [tokens])
    compiled = core().compile_model(probe, "CPU", {PRECISION: "f32", **threading})
    return int(compiled.get_property(THREADS)) // max(1, int(compiled.get_property("NUM_STREAMS")))


def _name(precision: ov.Type | str | None) -> str | None:
    return str(precision.to_string()) if isinstance(precision, ov.Type) else precision
