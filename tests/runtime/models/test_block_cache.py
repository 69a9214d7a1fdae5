"""Bytes of keys and values, from the buffers that a model's layers are given."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest

import ov_kernels
from edge_runtime.devices import core
from edge_runtime.models.attention import AttentionPattern, longgen
from edge_runtime.models.kv.pool import BlockPool, own_pools
from edge_runtime.models.kv.table import BlockTable
from edge_runtime.models.passes.block_sparse_attention import (
    BlockAttention,
    LayerShape,
    attention_op,
    block_bytes,
    block_table_input,
    cache_input,
    parameter,
)

pytestmark = pytest.mark.kernels

LLAMA_2_7B = LayerShape(num_heads=32, num_kv_heads=32, key_size=128, value_size=128)
CONTEXT, KEPT, CHUNK = 131_072, 2048, 512


def layers_of(pattern: AttentionPattern, shape: LayerShape) -> list[BlockPool]:
    """Return the pools of a model that is nothing but its attention: one text's tokens go through all layers."""
    ov_kernels.add_to(core(), required=True)
    width = shape.num_heads * shape.key_size
    tokens = [parameter(name, [-1, width], np.float32) for name in ("query", "key", "value")]
    spans = [parameter(name, [-1], np.int32) for name in ("past_lens", "subsequence_begins")]
    tables = [parameter(block_table_input(number), [-1, -1, -1], np.int32) for number in range(len(pattern.patterns))]
    size = block_bytes(shape, pattern.block_size, "u8")
    caches = [parameter(cache_input(layer), [-1, size], np.uint8) for layer in range(len(pattern.layers))]
    ends = []
    for layer, cache in enumerate(caches):
        inputs = [*tokens, cache, *spans, tables[pattern.layers[layer]]]
        ports = [node.output(0) for node in inputs]
        op = attention_op(ports, shape, pattern.of_layer(layer), pattern.block_size, "u8", 1.0)
        ends.append(op.output(0))
    compiled = core().compile_model(ov.Model(ends, [*tokens, *spans, *tables, *caches]), "CPU")
    heads = [(shape.num_heads, shape.num_kv_heads)] * len(pattern.layers)
    return own_pools(compiled, compiled.create_infer_request(), BlockAttention(pattern, heads))


def test_a_llama_of_32_layers_holds_what_longgen_s_paper_says():
    """-62 % at 128K, 12 full layers and 2048 tokens in the others: 38.5 % of full attention's bytes are allocated.

    One block a head is held beside what is seen, for a next turn that begins a few tokens before the end of this one.
    """
    pattern = longgen(32)
    pools = layers_of(pattern, LLAMA_2_7B)
    tables = [BlockTable(pool) for pool in pools]
    for table in tables:
        table.reserve(CONTEXT)
    spans = [(past, past + CHUNK) for past in range(0, CONTEXT, CHUNK)]
    for span in [*spans, (CONTEXT - 1, CONTEXT)]:  # a narrow step gives back what the last chunk took
        for table in tables:
            table.hold(*span)
    layers = zip(pools, pattern.groups, strict=True)
    sizes = [pool.num_bytes // len(group) for pool, group in layers for _ in group]
    full, seen = max(sizes), KEPT + pattern.block_size
    assert sorted(sizes) == [full * seen // CONTEXT] * 20 + [full] * 12
    assert sum(sizes) / (32 * full) == pytest.approx(12 / 32 + 20 / 32 * KEPT / CONTEXT, abs=4e-4)
