"""The gated MLPs of a compressed graph become one op each, CatsMlp, with the quantised values that NNCF chose.

    num_layers = fuse_mlps(model)                      # dense
    fuse_mlps(model, calibration.thresholds)           # sparse

What is looked for: y = (f(x Wgate) * (x Wup)) Wdown, f SiLU or GELU, in the ops that OpenVINO's PyTorch and ONNX
frontends make of it. Gate and up may be one matrix whose product is split (Phi-3, GLM). A bias behind `down` stays
where it is; elsewhere the op has no place for one. Layout of the op's weights: ov_kernels/src/cats_mlp/cats_mlp.hpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13
from openvino.utils.node_factory import NodeFactory

import ov_kernels
from edge_export.cats import GROUP
from edge_runtime.devices import core
from edge_runtime.errors import ExportError
from ov_kernels.mlp_blob import GatedMlp, Matrix, pack

OP_TYPE = "CatsMlp"
DENSE = np.array([-1], np.float32)
"""Thresholds with which no neuron is skipped."""
HINT = "export without --mlp fused and --cats"

Thresholds = Sequence[NDArray[np.float32]]


class _Projection(NamedTuple):
    """x W^T: the output `x` and the matrix."""

    x: Any
    matrix: Matrix


def fuse_mlps(model: ov.Model, thresholds: Thresholds | None = None) -> int:
    """Replace every gated MLP of `model` by the op, in place.

    Args:
        model: Weights in bf16 or int8, or in int4 in groups of a multiple of 128.
        thresholds: Thresholds of each MLP in the graph's order, (1,) or (F,); None for dense.

    Returns:
        How many there were.

    Raises:
        ExportError: An MLP cannot be fused, layers have none, or the thresholds are not one entry for each.
        ExtensionError: The compiled library of ov_kernels is not installed.
    """
    ov_kernels.add_to(core(), required=True)
    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    downs = [node for node in model.get_ordered_ops() if _gated_input(node)]
    _check_count(model, len(downs), thresholds)
    for down, limits in zip(downs, thresholds or [DENSE] * len(downs), strict=True):
        x, mlp = _read_mlp(down)
        _check_thresholds(down, mlp, limits)
        blob = pack(mlp, "records" if thresholds else "tiles")
        constants = (opset13.constant(blob), opset13.constant(limits.astype(np.float32)))
        op = factory.create(OP_TYPE, [x, *(constant.output(0) for constant in constants)], {"exact": False})
        op.set_friendly_name(_module_name(down).rpartition(".")[0] or OP_TYPE)
        down.output(0).replace(op.output(0))
    model.validate_nodes_and_infer_types()
    return len(downs)


def _check_count(model: ov.Model, found: int, thresholds: Thresholds | None) -> None:
    layers = sum(node.get_type_name() == "ScaledDotProductAttention" for node in model.get_ops())
    if found == 0 or found < layers:
        raise ExportError(f"a gated MLP of SiLU or GELU was found in {found} of {layers} layers", HINT)
    if thresholds is not None and len(thresholds) != found:
        raise ExportError(f"there are thresholds for {len(thresholds)} MLPs, but the graph has {found}", HINT)


def _check_thresholds(down: Any, mlp: GatedMlp, limits: NDArray[np.float32]) -> None:
    neurons = len(mlp.gate.values)
    if limits.shape not in ((1,), (neurons,)):
        raise ExportError(
            f"layer {_module_name(down)} has {neurons} neurons, but thresholds of shape {limits.shape}", HINT
        )


def _gated_input(down: Any) -> tuple[str, Any, Any] | None:
    """Return what a matrix product is fed with: activation, gate and up outputs; None if it is no down projection."""
    if down.get_type_name() != "MatMul" or not _has_constant_weights(down):
        return None
    product = down.input_value(0).get_node()
    if product.get_type_name() != "Multiply":
        return None
    for side, other in (product.input_values(), reversed(product.input_values())):
        activated = _activation(side.get_node())
        if activated:
            return *activated, other
    return None


def _activation(node: Any) -> tuple[str, Any] | None:
    """Return name and input of an activation function; None for another node."""
    kind, first = node.get_type_name(), node.input_value(0) if node.get_input_size() else None
    if kind == "Swish":
        return ("silu", first) if node.get_input_size() == 1 or _is_one(node.input_value(1)) else None
    if kind == "Gelu":
        return ("gelu_tanh" if node.get_attributes()["approximation_mode"] == "TANH" else "gelu_erf"), first
    if kind == "Multiply":  # x * sigmoid(x)
        for side, other in (node.input_values(), reversed(node.input_values())):
            if side.get_node().get_type_name() == "Sigmoid" and _is_same(side.get_node().input_value(0), other):
                return "silu", other
    return None


def _read_mlp(down: Any) -> tuple[Any, GatedMlp]:
    """Return input and weights of the MLP that ends in `down`.

    Raises:
        ExportError: The op cannot hold it.
    """
    found = _gated_input(down)
    assert found
    activation, *inputs = found
    try:
        gate, up = (_projection(value) for value in inputs)
        if not _is_same(gate.x, up.x):
            raise ValueError("gate and up read different inputs")
        mlp = GatedMlp(gate.matrix, up.matrix, _weights(down), activation)
        _check_sizes(mlp)
    except ValueError as error:
        raise ExportError(f"the MLP of layer {_module_name(down)} cannot be fused: {error}", HINT) from error
    return gate.x, mlp


def _check_sizes(mlp: GatedMlp) -> None:
    ffn, hidden = mlp.gate.values.shape
    if len({mlp.gate.format, mlp.up.format, mlp.down.format}) > 1:
        raise ValueError("its matrices have different numbers of bits")
    if mlp.up.values.shape != (ffn, hidden) or mlp.down.values.shape != (hidden, ffn):
        raise ValueError(
            f"its matrices have the shapes {mlp.gate.values.shape}, {mlp.up.values.shape} and "
            f"{mlp.down.values.shape}, which do not match"
        )


def _projection(value: Any) -> _Projection:
    """Read a matrix product, or one part of a split one.

    Raises:
        ValueError: It is none, or its weights have a form that the op does not know.
    """
    node = value.get_node()
    if node.get_type_name() in ("Split", "VariadicSplit"):
        whole = _projection(node.input_value(0))
        sizes = [output.get_partial_shape()[-1].get_length() for output in node.outputs()]
        first = sum(sizes[: value.get_index()])
        return whole._replace(matrix=_rows(whole.matrix, first, first + sizes[value.get_index()]))
    if node.get_type_name() == "Add":
        raise ValueError("its gate or up projection has a bias")
    if node.get_type_name() != "MatMul" or not _has_constant_weights(node) or node.get_attributes()["transpose_a"]:
        raise ValueError(f"its gate or up projection is a {node.get_type_name()}, expected a product with a matrix")
    return _Projection(node.input_value(0), _weights(node))


def _rows(matrix: Matrix, begin: int, end: int) -> Matrix:
    if matrix.scale is None or matrix.zero is None:
        return Matrix(matrix.values[begin:end])
    return Matrix(matrix.values[begin:end], matrix.scale[begin:end], matrix.zero[begin:end])


def _has_constant_weights(matmul: Any) -> bool:
    """Whether the second factor is a matrix in the file, compressed or not."""
    node = matmul.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Multiply", "Subtract", "Transpose"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _weights(matmul: Any) -> Matrix:
    """Return the weights of a matrix product, (outputs, inputs).

    Raises:
        ValueError: They are not compressed in a form that the op knows.
    """
    parts = _compressed(matmul.input_value(1).get_node())
    if not matmul.get_attributes()["transpose_b"]:
        parts = tuple(np.moveaxis(part, -1, 0) for part in parts)
    rows, columns = parts[0].shape[0], math.prod(parts[0].shape[1:])
    if len(parts) == 1:
        return Matrix(np.ascontiguousarray(parts[0].reshape(rows, columns)))
    values, scale, zero = parts[0], *(part.reshape(rows, -1) for part in parts[1:])
    repeats = 1
    if values.dtype == np.uint8:  # a group of several blocks has the same scale in each
        group = columns // scale.shape[1]
        if group % GROUP:
            raise ValueError(
                f"its quantisation group is {group} weights in a row of {columns}, expected a multiple of {GROUP}"
            )
        repeats = group // GROUP
    elif scale.shape[1] != 1:
        raise ValueError(f"an int8 row has {scale.shape[1]} scales, expected one")
    return Matrix(values.reshape(rows, columns), *(np.repeat(part, repeats, 1) for part in (scale, zero)))


def _compressed(node: Any) -> tuple[NDArray[Any], ...]:
    """Return values, and but for bf16 scales and zero points, as the op stores them, in the shapes of the constants.

    The graph is Convert(Reshape(Multiply(Subtract(Convert(values), Convert(zero)), scale))), where the outer two and
    the subtraction may be absent.
    """
    chain = list(_chain(node))
    constants = {name: operand for name, operand in chain if operand is not None}
    kind = constants["Constant"].get_element_type().get_type_name()
    scale = constants.get("Multiply")
    if kind == "bf16" and scale is None:
        return (constants["Constant"].data.view(np.uint16),)
    if scale is None or kind not in ("u8", "i8", "u4", "i4"):
        raise ValueError(f"its weights are stored in {kind}, expected bf16, int8 or int4")
    if scale.get_element_type() != ov.Type.f16:
        raise ValueError(f"its scales are stored in {scale.get_element_type().get_type_name()}, expected f16")
    scales, stored_zero = scale.get_data(), constants.get("Subtract")
    values = _integers(constants["Constant"])
    if stored_zero is not None:
        zero = _integers(stored_zero).astype(np.int8)
    else:
        zero = np.full(scales.shape, 8 if kind == "i4" else -128 if kind == "u8" else 0, np.int8)
    return values, scales, np.broadcast_to(zero, scales.shape)


def _chain(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the ops from weights to their constant, each with its own constant operand or None."""
    while node.get_type_name() != "Constant":
        operand = None
        if node.get_type_name() in ("Multiply", "Subtract"):
            operand = node.input_value(1).get_node()
            while operand.get_type_name() == "Convert":
                operand = operand.input_value(0).get_node()
        yield node.get_type_name(), operand
        node = node.input_value(0).get_node()
    yield "Constant", node


def _integers(constant: Any) -> NDArray[Any]:
    """Return a constant's integers as the op has them: int8 for 8 bits, uint8 of 0 to 15 for 4."""
    kind, shape = constant.get_element_type().get_type_name(), tuple(constant.shape)
    data = constant.get_data()
    if kind == "i8":
        return np.asarray(data)
    if kind == "u8":
        return (np.asarray(data) ^ 128).view(np.int8)
    packed = np.asarray(data).view(np.uint8).reshape(-1)
    nibbles = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[: math.prod(shape)].reshape(shape)
    return nibbles ^ 8 if kind == "i4" else nibbles


def _is_same(one: Any, other: Any) -> bool:
    return bool(one.get_node().get_name() == other.get_node().get_name() and one.get_index() == other.get_index())


def _is_one(value: Any) -> bool:
    node = value.get_node()
    return node.get_type_name() == "Constant" and bool(np.all(node.get_data() == 1))


def _module_name(node: Any) -> str:
    """Return the name that PyTorch has for the layer that a node came from."""
    return str(node.get_friendly_name()).removeprefix("__module.").split("/aten")[0]
