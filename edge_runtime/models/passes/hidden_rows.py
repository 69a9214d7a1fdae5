"""Let a model return hidden states beside its logits, for drafters that read them.

The rows are those whose logits are wanted: what the last matrix product is given, then, along the last axis, the
residual stream after each of some layers. The stream after a layer is the sum that its successor's norm reads: from
the successor's values, or from the last product, the first addition of two computed terms on the way back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13

from edge_runtime.errors import ModelFormatError
from edge_runtime.models.passes.paged_attention import attention_ops
from edge_runtime.models.passes.wanted_rows import last_product

HIDDEN = "hidden"
"""Name of the output."""
_VALUES = 2
"""Input of an attention op; queries and keys may be rotated, which is an addition too."""


def add_hidden_rows(model: ov.Model, layers: tuple[int, ...]) -> None:
    """Add an output (rows, 1, E (1 + layers)) to a model that computes only wanted rows, in place.

    Args:
        model: With PagedAttention.
        layers: Numbers of layers, from 0.

    Raises:
        ModelFormatError: A layer is not in the model, or its residual stream cannot be found.
    """
    last = last_product(model).input_value(0)
    rows = last.get_node()
    later = [op.input_value(_VALUES) for op in attention_ops(model)[1:]] + [rows.input_value(0)]
    parts = [last]
    for layer in layers:
        if layer >= len(later):
            raise ModelFormatError(
                f"hidden_layers names layer {layer}, but the model has layers 0 to {len(later) - 1}",
                "correct `hidden_layers` in edge_model.json",
            )
        stream = _stream_before(later[layer], layer)
        parts.append(opset13.gather(stream, rows.input_value(1), opset13.constant(np.int32(0))).output(0))
    result = opset13.result(opset13.concat(parts, -1) if layers else last)
    result.output(0).set_names({HIDDEN})
    model.add_results([result])


def _stream_before(value: Any, layer: int) -> Any:
    """Return the residual stream that a value was computed from."""
    while (terms := _computed(value)) and not (value.get_node().get_type_name() == "Add" and len(terms) == 2):
        value = terms[0]
    if not terms:
        raise ModelFormatError(f"the output of layer {layer} cannot be found in the graph")
    return value


def _computed(value: Any) -> list[Any]:
    """Return the inputs of a value's node that are not made of constants alone."""
    return [term for term in value.get_node().input_values() if not _is_constant(term)]


def _is_constant(value: Any) -> bool:
    node = value.get_node()
    return node.get_type_name() == "Constant" or bool(node.input_values() and not _computed(value))
