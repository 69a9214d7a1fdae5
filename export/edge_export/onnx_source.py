"""An ONNX decoder with KV cache to the stateful graph that the runtime expects.

ONNX has no attention op: attention comes as two matrix products around a softmax, the cache as inputs and outputs
`past_key_values.N.key/value` and `present.N.key/value`. Three steps:

1. OpenVINO's common transformations fuse the three ops into ScaledDotProductAttention. Two habits of PyTorch's ONNX
   exporter hide them, and are taken out first: a guard `where(isnan(p), 0, p)` behind the softmax, for rows that attend
   to nothing, which a causal mask without padding never has; and the scale split as sqrt(scale) on queries and keys.
2. Inputs and outputs of the cache become states, as optimum-intel does for PyTorch models.
3. `verify` compares the result with the untouched ONNX graph.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_export.sources import Source
from edge_runtime.devices import core
from edge_runtime.errors import ExportError
from edge_runtime.models.compiling import compile_model
from edge_runtime.models.passes.paged_attention import first_line

if TYPE_CHECKING:
    import openvino as ov

PAST = "past_key_values."
_INPUTS = ("input_ids", "attention_mask", "position_ids")


def load(source: Source) -> ov.Model:
    """Read the ONNX graph.

    Raises:
        ExportError: It is damaged, or not a decoder with KV cache.
    """
    try:
        model = core().read_model(source.onnx)
    except RuntimeError as error:
        raise ExportError(f"`{source.onnx}` cannot be read: {first_line(error)}") from error
    names = {port.get_any_name() for port in model.inputs}
    hint = "export it with `optimum-cli export onnx --task text-generation-with-past`"
    if not any(name.startswith(PAST) for name in names):
        raise ExportError(f"`{source.onnx}` has no inputs {PAST}N.key, so it cannot generate token by token", hint)
    unknown = sorted(name for name in names if not name.startswith(PAST) and name not in _INPUTS)
    if unknown or "input_ids" not in names:
        raise ExportError(f"`{source.onnx}` has inputs {sorted(names)[:4]} ..., expected {', '.join(_INPUTS)}", hint)
    return model


def num_parameters(source: Source) -> int:
    """Return the number of floating-point weights in the file."""
    import onnx

    graph = onnx.load(str(source.onnx), load_external_data=False).graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type in floats)


def reference_logits(model: ov.Model, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (B, T, V) logits of (B, T) token ids from the graph as it was read, with an empty cache, in f32."""
    batch, width = token_ids.shape
    compiled = compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = {
        "input_ids": token_ids,
        "attention_mask": np.ones_like(token_ids),
        "position_ids": np.broadcast_to(np.arange(width), token_ids.shape).copy(),
    }
    for port in compiled.inputs:
        if (name := port.get_any_name()).startswith(PAST):
            _, heads, _, size = port.get_partial_shape()
            inputs[name] = np.zeros(
                (batch, heads.get_length(), 0, size.get_length()), port.get_element_type().to_dtype()
            )
    wanted = {name: value for name, value in inputs.items() if name in {p.get_any_name() for p in compiled.inputs}}
    logits: NDArray[np.float32] = compiled(wanted)["logits"].astype(np.float32)
    return logits


def to_stateful(model: ov.Model) -> None:
    """Fuse attention and turn the cache into states, in place.

    Raises:
        ExportError: The attention is none that OpenVINO has an op for.
    """
    from openvino._offline_transformations import apply_moc_transformations
    from optimum.exporters.openvino.stateful import patch_stateful

    num_layers = sum(port.get_any_name().endswith(".key") for port in model.inputs)
    apply_moc_transformations(model, cf=False, smart_reshape=False)
    _drop_nan_guards(model)
    _scale_queries_only(model)
    apply_moc_transformations(model, cf=False, smart_reshape=False)
    fused = sum(node.get_type_name() == "ScaledDotProductAttention" for node in model.get_ops())
    if fused != num_layers:
        raise ExportError(
            f"OpenVINO recognises attention in only {fused} of the {num_layers} layers of this ONNX graph",
            "export the original Hugging Face folder instead",
        )
    patch_stateful(SimpleNamespace(is_encoder_decoder=False, model_type=""), model)


def _drop_nan_guards(model: ov.Model) -> None:
    for node in model.get_ops():
        if node.get_type_name() == "Select" and _is_nan_guard(node):
            for user in node.output(0).get_target_inputs():
                user.replace_source_output(node.input_value(2))


def _is_nan_guard(select: ov.Node) -> bool:
    condition, guarded = select.input_value(0).get_node(), select.input_value(2)
    return bool(
        condition.get_type_name() == "IsNaN"
        and condition.input_value(0) == guarded
        and guarded.get_node().get_type_name() == "Softmax"
    )


def _scale_queries_only(model: ov.Model) -> None:
    """Rewrite q @ (k * c) as (q * c) @ k for a constant number c."""
    from openvino import opset13

    for product in model.get_ops():
        scaled = product.input_value(1).get_node() if product.get_type_name() == "MatMul" else None
        if scaled is None or scaled.get_type_name() != "Multiply" or not _is_number(scaled.input_value(1).get_node()):
            continue
        query = opset13.multiply(product.input_value(0), scaled.input_value(1))
        product.input(0).replace_source_output(query.output(0))
        product.input(1).replace_source_output(scaled.input_value(0))
    model.validate_nodes_and_infer_types()


def _is_number(node: ov.Node) -> bool:
    return node.get_type_name() == "Constant" and int(np.prod(node.get_output_shape(0))) == 1
