"""Replace PagedAttention by BlockSparseAttention: the op of ours that reads only the blocks a layer's pattern sees.

Done at load, on the graph that `paged_graph` made, so the IR of a hybrid model is the plain one and only its manifest
says what its layers see. Layers that are sliding by nature (Gemma, Mistral) say so in the graph itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import openvino as ov
from openvino import opset13

import ov_kernels
from edge_runtime.attention import FULL, AttentionPattern, LayerPattern
from edge_runtime.config import LoadConfig
from edge_runtime.devices import core, kv_precision
from edge_runtime.errors import ConfigError, DeviceError, ModelFormatError
from edge_runtime.paged_graph import attention_ops

OP_TYPE = "BlockSparseAttention"
KV_TYPES = ("f32", "bf16", "u8")
"""How the op can keep keys and values."""
_SCALE, _WINDOW, _ALIBI, _SINKS = 9, 10, 11, 20
"""Inputs of PagedAttention."""


@dataclass(frozen=True)
class BlockAttention:
    """What the layers of a model see whose attention is ours.

    Attributes:
        pattern: Of each layer.
        heads: H and H_kv of each layer.
    """

    pattern: AttentionPattern
    heads: list[tuple[int, int]]


def cache_input(layer: int) -> str:
    """Return the name of the input that holds a layer's keys and values."""
    return f"kv_cache.{layer}"


def block_table_input(group: int) -> str:
    """Return the name of the input with the blocks of one group of layers."""
    return f"block_table.{group}"


def use_block_sparse_attention(
    model: ov.Model, pattern: AttentionPattern | None, device: str, config: LoadConfig
) -> BlockAttention | None:
    """Replace every attention op, in place, where a pattern or the user asks for it.

    Args:
        model: With PagedAttention.
        pattern: From the manifest; None for what the graph itself says.
        device: OpenVINO device.
        config: Its `attention` and what says how keys and values are kept count.

    Returns:
        What the layers see now; None where the stock op stays.

    Raises:
        ModelFormatError: The pattern does not fit the model.
        DeviceError: The device cannot run it.
        ConfigError: The stock op was asked for and cannot do this.
        ExtensionError: The compiled library is absent.
    """
    if config.attention == "stock" and pattern is not None:
        raise ConfigError(
            "attention is stock, but the model's layers see only a part of the context, which PagedAttention cannot do",
            "leave `attention` at auto",
        )
    if config.attention == "stock" or (config.attention == "auto" and pattern is None):
        return None
    if device != "CPU":
        raise DeviceError(f"{device} has no kernel for block-sparse attention", "run the model on CPU")
    layers = attention_ops(model)
    _refuse_other_terms(layers)
    found = pattern or AttentionPattern.of_layers([_natural_pattern(layer) for layer in layers])
    attention = BlockAttention(found, [_heads(layer) for layer in layers])
    _check(attention)
    _replace(model, layers, attention, kv_type(config))
    return attention


def kv_type(config: LoadConfig) -> str:
    """Return how the op keeps keys and values.

    Raises:
        ConfigError: It cannot keep them as asked.
    """
    kept = kv_precision(config)
    if kept not in KV_TYPES:
        raise ConfigError(
            f"kv_precision is {kept}, block-sparse attention keeps keys and values as one of {', '.join(KV_TYPES)}",
            "leave `kv_precision` at auto",
        )
    return kept


def _refuse_other_terms(layers: list[Any]) -> None:
    """Refuse attention that adds to its scores what the op does not know."""
    for number, layer in enumerate(layers):
        for told, port in (("ALiBi slopes", _ALIBI), ("learned sinks", _SINKS)):
            if layer.input_value(port).get_partial_shape().is_dynamic or len(_constant(layer, port)):
                raise ModelFormatError(
                    f"layer {number} has {told}, which block-sparse attention lacks",
                    "load the model with attention stock",
                )


def _check(attention: BlockAttention) -> None:
    pattern, heads = attention.pattern, attention.heads
    if len(pattern.layers) != len(heads):
        raise ModelFormatError(
            f"the manifest says what {len(pattern.layers)} layers see, the model has {len(heads)}",
            "export the model again",
        )
    for layer, (num_heads, num_kv_heads) in enumerate(heads):
        try:
            pattern.of_layer(layer).check(num_heads, num_kv_heads)
        except ConfigError as error:
            raise ModelFormatError(f"layer {layer}: {error}", "export the model with another pattern") from error


def _replace(model: ov.Model, layers: list[Any], attention: BlockAttention, kept_as: str) -> None:
    """Put an op of ours in the place of each layer's, and cache and table inputs in the place of the stock ones."""
    ov_kernels.add_to(core(), required=True)
    parameters = [_parameter(block_table_input(i), [-1, -1, -1], "i32") for i in range(len(attention.pattern.patterns))]
    for number, layer in enumerate(layers):
        (num_heads, num_kv_heads), block_size = attention.heads[number], attention.pattern.block_size
        pattern = attention.pattern.of_layer(number)
        sizes = [_fact(layer, name) for name in ("k_head_size", "v_head_size")]
        cache = _parameter(
            cache_input(number), [-1, ov_kernels.attention_block_bytes(block_size, *sizes, kept_as)], "u8"
        )
        parameters.append(cache)
        inputs = [
            *(layer.input_value(i) for i in range(3)),
            cache.output(0),
            layer.input_value(5),
            layer.input_value(6),
        ]
        table = parameters[attention.pattern.layers[number]]
        ours = _create(
            [*inputs, table.output(0)],
            {
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "block_size": block_size,
                "scale": _scale(layer, sizes[0]),
                "kv_type": kept_as,
                "window": -1 if pattern.window is None else pattern.window,
                "by_tokens": pattern.by_tokens,
                "sink": pattern.sink,
                "strides": pattern.head_strides(num_heads).tolist(),
                "offsets": pattern.head_offsets(num_heads).tolist(),
            },
        )
        ours.set_friendly_name(layer.get_friendly_name())
        layer.output(0).replace(ours.output(0))
    model.add_parameters(parameters)
    for parameter in model.get_parameters():
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _create(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    return factory.create(OP_TYPE, inputs, attributes)


def _parameter(name: str, shape: list[int], kind: str) -> Any:
    parameter = opset13.parameter(shape, kind, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _heads(layer: Any) -> tuple[int, int]:
    num_kv_heads = _fact(layer, "num_k_heads")
    return layer.input_value(0).get_partial_shape()[1].get_length() // _fact(layer, "k_head_size"), num_kv_heads


def _fact(layer: Any, name: str) -> int:
    return int(layer.get_rt_info()[name].value)


def _scale(layer: Any, head_size: int) -> float:
    values = _constant(layer, _SCALE)
    return float(values[0]) if values else float(head_size) ** -0.5


def _natural_pattern(layer: Any) -> LayerPattern:
    """Return what the graph itself says of a layer."""
    (window,) = _constant(layer, _WINDOW) or [0]
    return LayerPattern(window=int(window), by_tokens=True) if window else FULL


def _constant(layer: Any, number: int) -> list[float]:
    return list(layer.input_value(number).get_node().data.ravel())
