"""Compile a stateful decoder for the NPU by OpenVINO's NPUW, which cuts it into parts of static shape."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import openvino as ov

from edge_runtime.devices import npu_core
from edge_runtime.errors import DeviceError, ModelFormatError
from edge_runtime.models.compiling import check_added_properties, compile_model
from edge_runtime.models.passes.paged_attention import first_line
from edge_runtime.models.plan import CompilePlan

PARTITIONINGS: tuple[dict[str, Any], ...] = ({}, {"NPUW_ONLINE_KEEP_BLOCKS": 2}, {"NPUW_ONLINE_PIPELINE": "NONE"})
"""How NPUW cuts a model into parts that repeat, in the order tried. It wants 5 repetitions by default, and fails on
models of 3 or 4 layers with "Model references undeclared parameters"; wanting 2 compiles them. Gemma 2 in a context of
one chunk only compiles in one piece (OpenVINO 2026.4.1)."""
BYTES_OF_F16 = 2


def check_is_decoder(model: ov.Model) -> None:
    """Refuse what is not a decoder that NPUW takes.

    Raises:
        ModelFormatError: It has no KV-cache states, or lacks an input.
    """
    missing = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    missing -= {name for port in model.inputs for name in port.get_names()}
    if missing or not model.get_sinks():
        lack = f"no input `{min(missing)}`" if missing else "no KV-cache states"
        raise ModelFormatError(f"the model has {lack}, which the NPU needs", "export it with `edge-run export`")


def token_kv_bytes(model: ov.Model) -> int:
    """Return the bytes that one token adds to the keys and values: a state's batch and length have no size yet."""
    shapes = [variable.info.data_shape for variable in model.get_variables()]
    return BYTES_OF_F16 * sum(math.prod(int(d.get_length()) for d in shape if d.is_static) for shape in shapes)


def compile_decoder(model: ov.Model, plan: CompilePlan) -> ov.CompiledModel:
    """Compile in the first of the partitionings that succeeds.

    Raises:
        DeviceError: The device cannot compile the model.
    """
    *others, last = PARTITIONINGS
    core = npu_core()
    _refuse_unknown(core, plan)
    for partitioning in others:
        with contextlib.suppress(RuntimeError):
            return compile_model(model, plan.device, {**partitioning, **plan.properties}, core)
    try:
        return compile_model(model, plan.device, {**last, **plan.properties}, core)
    except RuntimeError as error:
        check_added_properties(error, plan.device, plan.asked)
        lacks_compiler = "compiler" in str(error) and "annot load library" in str(error)
        hint = "install Intel's NPU driver with its compiler" if lacks_compiler else "run it on CPU or GPU"
        raise DeviceError(f"{plan.device} cannot compile the model: {first_line(error)}", hint) from error


def _refuse_unknown(core: ov.Core, plan: CompilePlan) -> None:
    """Raise DeviceError for an added property that the plugin does not know: compiling, NPUW ignores such a one."""
    for name in plan.added_properties:
        try:
            core.get_property("NPU", name)
        except RuntimeError as error:
            if "Unsupported" in str(error):
                check_added_properties(error, plan.device, plan.asked)
        except TypeError:  # known, but of a type without a Python form
            continue
