"""Gated MLPs as one op of ours, CatsMlp, and back: the same mathematics in standard ops where the op has no kernel.

A model exported with fused MLPs holds only the op, whose blob has the quantised weights (ov_kernels/mlp_blob.py). A
device without the op, or a CPU on which OpenVINO's own kernels are faster, gets the model lowered: the same values and
thresholds, no skipped weights.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13

from edge_runtime.config import LoadConfig
from edge_runtime.devices import activation_group_size, core
from ov_kernels.mlp_blob import GatedMlp, Matrix, unpack

OP_TYPE = "CatsMlp"
TRIAL_ROWS = (1, 4)
"""Tokens of a plain step and of one that verifies a short draft: what decoding does."""
TRIAL_RUNS = 5


def choose_mlps(model: openvino.Model, device: str, config: LoadConfig, properties: dict[str, Any]) -> str | None:
    """Decide in which form a model's fused MLPs run, and bring them into it, in place.

    Args:
        model: As read from its folder.
        device: OpenVINO device.
        config: Its `mlp` and `precision` count.
        properties: What the model is going to be compiled with.

    Returns:
        What runs and why, for reports; None for a model without fused MLPs.
    """
    nodes = fused_mlps(model)
    if not nodes:
        return None
    is_exact = config.precision == "f32" and not activation_group_size(config, None)
    for node in nodes:
        node.set_attribute("exact", is_exact)
    if device != "CPU":
        lower(model)
        return f"stock: {device} has no kernel for fused MLPs"
    if config.mlp != "auto":
        chosen, reason = config.mlp, ""
    else:
        chosen, reason = _faster_form(nodes[0], properties)
    if chosen == "stock":
        lower(model)
    return chosen + reason


def fused_mlps(model: openvino.Model) -> list[Any]:
    """Return a model's CatsMlp nodes, in order."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() == OP_TYPE]


def lower(model: openvino.Model) -> None:
    """Replace every CatsMlp by standard ops, in place."""
    for node in fused_mlps(model):
        x, blob, thresholds = (node.input_value(i) for i in range(3))
        y = standard_ops(unpack(blob.get_node().data), x, thresholds.get_node().data)
        y.get_node().set_friendly_name(node.get_friendly_name())
        node.output(0).replace(y)


def standard_ops(mlp: GatedMlp, x: Any, thresholds: NDArray[np.float32]) -> Any:
    """Return the output of an MLP in OpenVINO's own ops.

    Args:
        mlp: Its weights.
        x: Output of f32 [.., H].
        thresholds: (1,) or (F,); dead where |f(gate)| is at most that.
    """
    a = _activated(opset13.matmul(x, weights(mlp.gate), False, True), mlp.activation)
    if (thresholds >= 0).any():
        is_dead = opset13.less_equal(opset13.absolute(a), opset13.constant(np.array(thresholds)))
        a = opset13.select(is_dead, opset13.constant(np.float32(0)), a)
    up = opset13.matmul(x, weights(mlp.up), False, True)
    return opset13.matmul(opset13.multiply(a, up), weights(mlp.down), False, True).output(0)


def weights(matrix: Matrix) -> Any:
    """Return a matrix as compressed constants in the form that OpenVINO's plugins multiply without unpacking."""
    if matrix.scale is None or matrix.zero is None:
        values = np.ascontiguousarray(matrix.values)
        return opset13.convert(_constant(values, openvino.Type.bf16, values.shape), "f32")
    (rows, columns), groups = matrix.values.shape, matrix.scale.shape[1]
    grouped, one = (rows, groups, columns // groups), (rows, groups, 1)
    if groups == 1:
        grouped, one = (rows, columns), (rows, 1)  # type: ignore[assignment]
    if matrix.format == "u4":
        pairs = np.ascontiguousarray(matrix.values).reshape(-1, 2)
        values = _constant(pairs[:, 0] | pairs[:, 1] << 4, openvino.Type.u4, grouped)
        zero: NDArray[Any] = np.ascontiguousarray(matrix.zero).view(np.uint8)
    else:
        values = opset13.constant((np.ascontiguousarray(matrix.values).view(np.uint8) ^ 128).reshape(grouped))
        zero = np.ascontiguousarray(matrix.zero).view(np.uint8) ^ 128
    zeros = opset13.convert(opset13.constant(zero.reshape(one)), "f16")
    shifted = opset13.subtract(opset13.convert(values, "f16"), zeros)
    scaled = opset13.multiply(shifted, opset13.constant(np.ascontiguousarray(matrix.scale).reshape(one)))
    whole = scaled if groups == 1 else opset13.reshape(scaled, np.array([rows, columns]), False)
    return opset13.convert(whole, "f32")


def _constant(content: NDArray[Any], kind: openvino.Type, shape: tuple[int, ...]) -> Any:
    tensor = openvino.Tensor(kind, openvino.Shape(shape))
    np.copyto(tensor.data.reshape(-1).view(np.uint8), content.reshape(-1).view(np.uint8))
    return openvino.op.Constant(tensor)


def _activated(x: Any, activation: str) -> Any:
    if activation == "silu":
        return opset13.swish(x)
    return opset13.gelu(x, "tanh" if activation == "gelu_tanh" else "erf")


def _faster_form(node: Any, properties: dict[str, Any]) -> tuple[str, str]:
    """Time one layer's MLP in both forms; return the faster one and the figures."""
    shared = {name: value for name, value in properties.items() if name not in ("CACHE_DIR", "KV_CACHE_PRECISION")}
    forms = {"fused": _alone(node, is_lowered=False), "stock": _alone(node, is_lowered=True)}
    requests = {name: core().compile_model(one, "CPU", shared).create_infer_request() for name, one in forms.items()}
    del forms
    hidden = requests["fused"].model_inputs[0].get_partial_shape()[2].get_length()
    random, spent = np.random.default_rng(0), dict.fromkeys(requests, 0.0)
    for rows in TRIAL_ROWS:
        x = openvino.Tensor(random.standard_normal((1, rows, hidden), dtype=np.float32))
        times: dict[str, list[float]] = {name: [] for name in requests}
        for _ in range(1 + TRIAL_RUNS):
            for name, request in requests.items():
                request.set_input_tensor(x)
                begin = time.perf_counter()
                request.start_async()
                request.wait()
                times[name].append(time.perf_counter() - begin)
        for name, values in times.items():
            spent[name] += 1000 * median(values[1:])  # the first run prepares the plugin's kernels
    chosen = min(spent, key=lambda name: spent[name])
    return chosen, f": a layer's MLP takes {spent['fused']:.2f} ms fused, {spent['stock']:.2f} ms in OpenVINO's ops"


def _alone(node: Any, *, is_lowered: bool) -> openvino.Model:
    """Return a model of one MLP: a copy of the node, or its standard ops."""
    hidden = node.input_value(0).get_partial_shape()[-1].get_length()
    x = opset13.parameter([1, -1, hidden], np.float32)
    blob, thresholds = (node.input_value(i).get_node() for i in (1, 2))
    if is_lowered:
        return openvino.Model([standard_ops(unpack(blob.data), x.output(0), thresholds.data)], [x])
    y = _copy(node, [x.output(0), blob.output(0), thresholds.output(0)])
    return openvino.Model([y], [x])


def _copy(node: Any, inputs: list[Any]) -> Any:
    from openvino.utils.node_factory import NodeFactory

    import ov_kernels

    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    return factory.create(OP_TYPE, inputs, dict(node.get_attributes())).output(0)
