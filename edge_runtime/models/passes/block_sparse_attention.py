"""Replace PagedAttention by BlockSparseAttention: the op of ours that reads only the blocks a layer's pattern sees.

Done at load, on a graph with PagedAttention, so the IR of a hybrid model is the plain one and only its manifest says
what its layers see. Layers that are sliding by nature (Gemma, Mistral) say so in the graph itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13

import ov_kernels
from edge_runtime.devices import core
from edge_runtime.errors import ConfigError, ExtensionError, ModelFormatError
from edge_runtime.models.attention import FULL, AttentionPattern, LayerPattern
from edge_runtime.models.passes.paged_attention import STOCK_OP, attention_ops
from edge_runtime.models.plan import CompilePlan

_log = logging.getLogger(__name__)

OP_TYPE = "BlockSparseAttention"
LARGEST_HEAD, MOST_GROUPED = 256, 64
"""Limits of the op: numbers of a key, and query heads that share one."""
OURS_FROM = 8 << 20
"""Bytes of weights a layer from which our op is the choice for full attention too. A step of it costs the plugin about
15 us a layer more, whatever the context; OpenVINO's costs more from some hundred tokens on. On 2 cores with AVX-512, in
the shape of Qwen3-0.6B in int4: 0.96 of its speed at 128 tokens, 1.09 at 1024, 1.26 at 4096, there 2.4 for 5 tokens."""
_SCALE, _WINDOW, _ALIBI, _SINKS = 9, 10, 11, 20
"""Inputs of PagedAttention."""


@dataclass(frozen=True)
class BlockAttention:
    """What the layers of a model see whose attention is ours.

    Attributes:
        pattern: Attention pattern of each layer.
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


def use_block_sparse_attention(model: ov.Model, plan: CompilePlan, weight_bytes: int) -> BlockAttention | None:
    """Replace every attention op, in place, where a pattern or the user asks for it, or where that is faster.

    Args:
        model: With PagedAttention.
        plan: Which op, and what the layers see.
        weight_bytes: Bytes of the model's weights.

    Returns:
        What the layers see now; None where the stock op stays.

    Raises:
        ModelFormatError: The pattern does not fit the model.
        ExtensionError: The compiled library is absent.
    """
    layers = attention_ops(model)
    if plan.kv_type is None or (plan.attention == "auto" and not _is_faster(layers, weight_bytes)):
        return None
    _refuse_other_terms(layers)
    found = plan.pattern or AttentionPattern.of_layers([_natural_pattern(layer) for layer in layers])
    attention = BlockAttention(found, layer_heads(model))
    _check(attention)
    _replace(model, layers, attention, plan.kv_type)
    return attention


def _is_faster(layers: list[Any], weight_bytes: int) -> bool:
    """Whether our op can serve a model as it is, and is not slower; how many tokens it will hold nobody knows.

    What it cannot serve is no error: nobody has asked for it.
    """
    return (
        weight_bytes >= OURS_FROM * len(layers)
        and not any(map(_other_terms, layers))
        and all(map(_has_known_sizes, layers))
        and _is_installed()
    )


def _has_known_sizes(layer: Any) -> bool:
    num_heads, num_kv_heads = _heads(layer)
    sizes = [_fact(layer, name) for name in ("k_head_size", "v_head_size")]
    return num_heads <= MOST_GROUPED * num_kv_heads and all(size % 16 == 0 and size <= LARGEST_HEAD for size in sizes)


def _is_installed() -> bool:
    try:
        return ov_kernels.add_to(core()) and ov_kernels.instruction_set() != "none"
    except ExtensionError as error:
        _log.warning("attention runs in OpenVINO's op because edge-run's own cannot be loaded: %s", error)
        return False


def layer_heads(model: ov.Model) -> list[tuple[int, int]]:
    """Return H and H_kv of each layer of a model with PagedAttention."""
    return [_heads(layer) for layer in attention_ops(model)]


def _other_terms(layer: Any) -> str | None:
    """Return what attention adds to its scores that our op does not know."""
    for told, port in (("ALiBi slopes", _ALIBI), ("learned sinks", _SINKS)):
        if layer.input_value(port).get_partial_shape().is_dynamic or len(_constant(layer, port)):
            return told
    return None


def _refuse_other_terms(layers: list[Any]) -> None:
    for number, layer in enumerate(layers):
        if told := _other_terms(layer):
            raise ModelFormatError(
                f"layer {number} uses {told}, which block-sparse attention does not support",
                "load the model with attention=stock",
            )


def _check(attention: BlockAttention) -> None:
    pattern, heads = attention.pattern, attention.heads
    if len(pattern.layers) != len(heads):
        raise ModelFormatError(
            f"the manifest has attention patterns for {len(pattern.layers)} layers, but the model has {len(heads)}",
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
    pattern = attention.pattern
    tables = [parameter(block_table_input(number), [-1, -1, -1], np.int32) for number in range(len(pattern.patterns))]
    caches = []
    for number, layer in enumerate(layers):
        key_size, value_size = (_fact(layer, name) for name in ("k_head_size", "v_head_size"))
        shape = LayerShape(*attention.heads[number], key_size, value_size)
        caches.append(parameter(cache_input(number), [-1, block_bytes(shape, pattern.block_size, kept_as)], np.uint8))
        stock = [layer.input_value(port) for port in (0, 1, 2, 5, 6)]
        inputs = [*stock[:3], caches[-1].output(0), *stock[3:], tables[pattern.layers[number]].output(0)]
        ours = attention_op(
            inputs, shape, pattern.of_layer(number), pattern.block_size, kept_as, _scale(layer, key_size)
        )
        ours.set_friendly_name(layer.get_friendly_name())
        layer.output(0).replace(ours.output(0))
    model.add_parameters([*tables, *caches])
    for unused in [
        p for p in model.get_parameters() if all(_is_stock(user) for user in p.output(0).get_target_inputs())
    ]:
        model.remove_parameter(unused)
    model.validate_nodes_and_infer_types()


def _is_stock(user: Any) -> bool:
    """Whether an input belongs to one of the ops that were replaced, which live on as long as someone holds them."""
    return bool(user.get_node().get_type_name() == STOCK_OP)


class LayerShape(NamedTuple):
    """Sizes of one layer's attention: H, H_kv, and D of keys and of values."""

    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int


def block_bytes(shape: LayerShape, block_size: int, kept_as: str) -> int:
    """Return the bytes of one block of keys and values of one KV head."""
    return ov_kernels.attention_block_bytes(block_size, shape.key_size, shape.value_size, kept_as)


def attention_op(
    inputs: list[Any], shape: LayerShape, pattern: LayerPattern, block_size: int, kept_as: str, scale: float
) -> Any:
    """Return our op as a node.

    Args:
        inputs: Query, key and value of T tokens, cache, past_lens, subsequence_begins and block table.
        shape: Heads and head size of the layer.
        pattern: Attention pattern of the layer.
        block_size: Tokens of a block.
        kept_as: How keys and values are kept, one of `plan.KV_TYPES`.
        scale: Factor on the products of queries and keys.
    """
    attributes = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "block_size": block_size,
        "scale": scale,
        "kv_type": kept_as,
        "window": -1 if pattern.window is None else pattern.window,
        "by_tokens": pattern.by_tokens,
        "sink": pattern.sink,
        "strides": pattern.head_strides(shape.num_heads).tolist(),
        "offsets": pattern.head_offsets(shape.num_heads).tolist(),
    }
    return ov_kernels.create(OP_TYPE, inputs, attributes)


def parameter(name: str, shape: list[int], kind: type[np.generic]) -> Any:
    """Return an input of a model."""
    made = opset13.parameter(shape, kind, name=name)
    made.output(0).set_names({name})
    return made


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
    """Return the values of an input that depends on no input of the model; exporters may compute it in steps."""
    value = layer.input_value(number)
    if value.get_node().get_type_name() != "Constant":
        from openvino.passes import ConstantFolding, Manager

        folding = Manager()
        folding.register_pass(ConstantFolding())
        folding.run_passes(ov.Model([value], []))
    return list(layer.input_value(number).get_node().data.ravel())
