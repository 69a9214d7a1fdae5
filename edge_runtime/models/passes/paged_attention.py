"""Rewrite a stateful IR for the PagedAttention engine.

OpenVINO's own transformation turns the KV states into cache inputs that the plugin updates in place, and the batch into
a flat list of tokens: `input_ids (T)`, `position_ids (T)`, logits `(T, 1, V)`.

The 28 inputs of the PagedAttention op: openvino/op/paged_attention.hpp of OpenVINO 2026.4.
"""

from __future__ import annotations

import openvino as ov

from edge_runtime.errors import ModelFormatError

STOCK_OP = "PagedAttentionExtension"


def to_paged_attention(model: ov.Model) -> None:
    """Rewrite `model` in place.

    Args:
        model: A stateful decoder with scaled-dot-product attention, as optimum-intel exports it.

    Raises:
        ModelFormatError: The model is not such a decoder.
    """
    from openvino._offline_transformations import paged_attention_transformation

    if not model.get_sinks():
        raise ModelFormatError(
            "the model has no KV-cache states, so it cannot generate token by token",
            "export it with `edge-run export`, or with optimum's task text-generation-with-past",
        )
    if "runtime_options" in model.get_rt_info():
        del model.get_rt_info()["runtime_options"]
    try:
        paged_attention_transformation(model)
    except RuntimeError as error:
        raise ModelFormatError(
            f"OpenVINO cannot convert this model to PagedAttention: {first_line(error)}",
            "export it with `edge-run export`, which checks this",
        ) from error


def attention_ops(model: ov.Model) -> list[ov.Node]:
    """Return the PagedAttention ops in layer order, which is the order of their cache inputs."""
    ops = [node for node in model.get_ordered_ops() if node.get_type_name() == STOCK_OP]
    return sorted(ops, key=_layer_number)


def _layer_number(node: ov.Node) -> int:
    return int(node.input_value(3).get_node().get_friendly_name().rsplit(".", 1)[1])


def first_line(error: Exception) -> str:
    """Return the informative line of an OpenVINO error: the last that is not a source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or ["no reason given"])[-1].rstrip(".")
