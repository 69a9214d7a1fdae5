"""Gated MLPs as one op of ours, CatsMlp, and back: the same mathematics in standard ops where the op has no kernel.

An exported model with fused MLPs holds only the op, whose blob has the quantised weights (ov_kernels/mlp_blob.py). A
device without the op, or a CPU on which OpenVINO's own kernels are faster, gets the model lowered: the same values and
thresholds, no skipped weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13

from ov_kernels.mlp_blob import GatedMlp, Matrix, unpack

OP_TYPE = "CatsMlp"


def fused_mlps(model: openvino.Model) -> list[Any]:
    """Return a model's CatsMlp nodes, in order."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() == OP_TYPE]


def lower(model: openvino.Model) -> int:
    """Replace every CatsMlp by standard ops, in place.

    Returns:
        How many there were.
    """
    nodes = fused_mlps(model)
    for node in nodes:
        x, blob, thresholds = (node.input_value(i) for i in range(3))
        mlp = unpack(blob.get_node().data)
        y = standard_ops(mlp, x, thresholds.get_node().data)
        y.get_node().set_friendly_name(node.get_friendly_name())
        node.output(0).replace(y)
    return len(nodes)


def standard_ops(mlp: GatedMlp, x: Any, thresholds: NDArray[np.float32]) -> Any:
    """Return the output of an MLP in OpenVINO's own ops.

    Args:
        mlp: Its weights.
        x: Output of f32 [.., H].
        thresholds: (1,) or (F,); dead where |f(gate)| is at most that.
    """
    a = _activated(opset13.matmul(x, weights(mlp.gate), False, True), mlp.activation)
    if (thresholds >= 0).any():
        is_dead = opset13.less_equal(opset13.absolute(a), opset13.constant(thresholds))
        a = opset13.select(is_dead, opset13.constant(np.float32(0)), a)
    up = opset13.matmul(x, weights(mlp.up), False, True)
    return opset13.matmul(opset13.multiply(a, up), weights(mlp.down), False, True).output(0)


def weights(matrix: Matrix) -> Any:
    """Return a matrix as compressed constants in the form that OpenVINO's plugins multiply without unpacking."""
    if matrix.scale is None or matrix.zero is None:
        values = np.ascontiguousarray(matrix.values)
        return opset13.convert(_constant(values, openvino.Type.bf16, values.shape), "f32")
    (rows, columns), groups = matrix.values.shape, matrix.scale.shape[1]
    grouped, one = ((rows, columns), (rows, 1)) if groups == 1 else ((rows, groups, columns // groups), (rows, groups, 1))
    if matrix.format == "u4":
        packed = np.ascontiguousarray(matrix.values).reshape(-1, 2)
        values = _constant(packed[:, 0] | packed[:, 1] << 4, openvino.Type.u4, grouped)
        zero = matrix.zero.view(np.uint8)
    else:
        values = opset13.constant((matrix.values.view(np.uint8) ^ 128).reshape(grouped))
        zero = np.ascontiguousarray(matrix.zero).view(np.uint8) ^ 128
    shifted = opset13.subtract(opset13.convert(values, "f16"), opset13.convert(opset13.constant(zero.reshape(one)), "f16"))
    scaled = opset13.multiply(shifted, opset13.constant(np.ascontiguousarray(matrix.scale).reshape(one)))
    whole = scaled if groups == 1 else opset13.reshape(scaled, np.array([rows, columns]), False)
    return opset13.convert(whole, "f32")


def _constant(content: NDArray[np.generic], kind: openvino.Type, shape: tuple[int, ...]) -> Any:
    tensor = openvino.Tensor(kind, openvino.Shape(shape))
    np.copyto(tensor.data.reshape(-1).view(np.uint8), content.reshape(-1).view(np.uint8))
    return openvino.op.Constant(tensor)


def _activated(x: Any, activation: str) -> Any:
    if activation == "silu":
        return opset13.swish(x)
    return opset13.gelu(x, "tanh" if activation == "gelu_tanh" else "erf")
