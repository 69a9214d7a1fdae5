"""`edge-run devices`: the devices of this computer, and how edge-run computes on each."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime import __version__
from edge_runtime.cli import console
from edge_runtime.errors import ExtensionError

if TYPE_CHECKING:
    import openvino as ov

LARGE = 1 << 30
"""Bytes of weights that are worth every thread."""
LIBRARIES = ("openvino", "numpy", "tokenizers", "huggingface_hub")


def devices(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """List this computer's devices, and the precision and threads that are used on each by default."""
    report = {
        "devices": _devices(),
        "kernels": _kernels(),
        "versions": {
            "edge-run": __version__,
            **{name: version(name) for name in LIBRARIES},
            "python": platform.python_version(),
        },
    }
    if as_json:
        console.write_json(report)
    else:
        _print_report(report)


def _devices() -> list[dict[str, Any]]:
    from edge_runtime.devices import describe_devices

    return [{**device, **_choices(device["device"])} for device in describe_devices()]


def _choices(device: str) -> dict[str, Any]:
    """Return what OpenVINO picks for a model on this device; nothing where the device refuses to say."""
    from edge_runtime.models.compiling import compile_model

    try:
        compiled = compile_model(_probe(), device, {"PERFORMANCE_HINT": "LATENCY"})
        picked = {"precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()}
        if device.startswith("CPU"):
            picked["num_threads"] = compiled.get_property("INFERENCE_NUM_THREADS")
            picked["auto"] = _plans(device, picked["precision"])
    except RuntimeError:
        return {}
    return picked


def _plans(device: str, default: str) -> dict[str, dict[str, Any]]:
    """Return how edge-run computes on the CPU by default, and why, for each kind of weights."""
    from edge_runtime.config import LoadConfig
    from edge_runtime.models.plan import make_plan
    from edge_runtime.models.weights import FLOATS, KINDS, Weights

    plans = {}
    for kind in KINDS:
        plan = make_plan(device, LoadConfig(), Weights(num_bytes=LARGE, kind=kind, has_floats=kind in FLOATS))
        names = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION")
        resolved = {"INFERENCE_PRECISION_HINT": default, **plan.properties}
        plans[kind] = {**{name.lower(): resolved[name] for name in names}, "reason": plan.reason}
        if not plan.rounds_activations:
            del plans[kind]["dynamic_quantization_group_size"]
    return plans


def _probe() -> ov.Model:
    import numpy as np
    import openvino as ov
    from openvino import opset8 as op

    tokens = op.parameter([1, 8], np.float32)
    weights = op.constant(np.eye(8, dtype=np.float32))
    return ov.Model([op.matmul(tokens, weights, False, False)], [tokens])


def _kernels() -> dict[str, Any]:
    """Say whether our own ops can be used, and if not, why."""
    import openvino as ov

    import ov_kernels

    try:
        path = ov_kernels.library_path()
        ov_kernels.add_to(ov.Core(), required=True)
        instructions = ov_kernels.instruction_set()
    except ExtensionError as error:
        return {"is_loaded": False, "instruction_set": "none", "problem": str(error), "hint": error.hint}
    return {"is_loaded": True, "instruction_set": instructions, "library": str(path)}


def _print_report(report: dict[str, Any]) -> None:
    for device in report["devices"]:
        print(f"{device['device']:5} {device['name']}")
        names = {"precision": "computes in", "num_threads": "threads:"}
        picked = ", ".join(f"{label} {device[name]}" for name, label in names.items() if name in device)
        print(f"{'':5} {picked or 'does not say what it picks'}")
        for kind, plan in device.get("auto", {}).items():
            print(f"{'':5} {kind + ' weights:':15} {console.describe_arithmetic(plan)}")
    kernels = report["kernels"]
    print(f"\nkernels: {kernels['instruction_set']} ({kernels['library' if kernels['is_loaded'] else 'problem']})")
    print(", ".join(f"{name} {number}" for name, number in report["versions"].items()))
