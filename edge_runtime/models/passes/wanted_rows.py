"""Gather the rows whose logits are wanted before the last matrix product.

A prompt of 1000 tokens computes one row of the vocabulary, not 1000.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13

from edge_runtime.errors import ModelFormatError

LOGITS_ROWS = "logits_rows"
"""Input with the numbers of the wanted rows."""
ROW_WISE_OPS = ("Add", "Multiply", "Divide", "Tanh", "Convert", "Reshape", "Squeeze", "Unsqueeze", "Subtract")
"""What may stand between the last matrix product and the logits: soft-capping, scaling, a bias, layout."""


def keep_wanted_rows(model: ov.Model) -> None:
    """Rewrite `model`, whose first axis is tokens, in place.

    Raises:
        ModelFormatError: Its logits do not come from a matrix product.
    """
    product = last_product(model)
    rows = opset13.parameter([-1], np.int32, name=LOGITS_ROWS)
    rows.output(0).set_names({LOGITS_ROWS})
    gathered = opset13.gather(product.input_value(0), rows, opset13.constant(np.int32(0)))
    product.input(0).replace_source_output(gathered.output(0))
    model.add_parameters([rows])


def last_product(model: ov.Model) -> ov.Node:
    """Return the matrix product that gives the logits.

    Raises:
        ModelFormatError: There is none.
    """
    if not any("logits" in output.get_names() for output in model.outputs):
        raise ModelFormatError(
            "the model has no output `logits`, so it is not a language model", "export it with `edge-run export`"
        )
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in ROW_WISE_OPS:
        node = next(
            (value.get_node() for value in node.input_values() if value.get_node().get_type_name() != "Constant"), node
        )
    if node.get_type_name() != "MatMul":
        raise ModelFormatError(f"the logits come from a {node.get_type_name()}, expected a matrix product")
    return node
