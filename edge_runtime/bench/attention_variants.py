"""Ways to compute attention at a given place of a long context, without having computed what comes before.

All blocks hold the same numbers, which no kernel can tell from a text: time does not depend on them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import openvino as ov
from openvino import opset13

import ov_kernels
from edge_runtime.config import LoadConfig
from edge_runtime.devices import core
from edge_runtime.models.attention import AttentionPattern
from edge_runtime.models.base import advance
from edge_runtime.models.compiling import compile_model
from edge_runtime.models.kv.inputs import BlockInputs, OwnInputs, StockInputs
from edge_runtime.models.kv.pool import STOCK_CACHES, BlockPool, own_pools, stock_pools
from edge_runtime.models.kv.sequence import PagedSequence, Sequences
from edge_runtime.models.paged import PagedModel
from edge_runtime.models.passes.block_sparse_attention import (
    BlockAttention,
    LayerShape,
    attention_op,
    block_bytes,
    block_table_input,
    cache_input,
    parameter,
)
from edge_runtime.models.plan import make_plan
from edge_runtime.models.weights import Weights

KV_TYPE = "u8"
COLD_BYTES, MOST_REPEATS = 128 << 20, 32
"""A layer is repeated in its graph until its caches have so many bytes: no processor's cache then holds them, and what
a call costs outside is shared out, as among the layers of a model."""
BLOCKS_AT_ONCE = 1024
"""Blocks that are filled at once, so that their copy needs little memory."""


class Case(NamedTuple):
    """What a model's layers see, by name; `stride` is 0 where there is none."""

    name: str
    stride: int
    pattern: AttentionPattern


class Variant(Protocol):
    """One way to compute, at a context that only grows.

    Attributes:
        impl: `edge` or `genai`.
        case: What is seen.
        repeats: How often a step goes through what is measured.
    """

    impl: str
    case: Case
    repeats: int

    def place(self, past: int, end: int) -> None:
        """Hold `past` tokens, and make room for those up to `end`."""

    def step(self, count: int) -> None:
        """Compute `count` tokens after those held; the next step computes them again."""

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""


class _Layer:
    """An attention op alone, `repeats` times in one graph.

    Args:
        case: What is seen.
        repeats: How often the graph has it.
        model: The graph.
        shape: The layer's.
        context: Most tokens.
    """

    impl: str

    def __init__(self, case: Case, repeats: int, model: ov.Model, shape: LayerShape, context: int) -> None:
        self.case, self.repeats = case, repeats
        compiled = compile_model(model, "CPU", _properties())
        request = compiled.create_infer_request()
        self._tokens = _Tokens(request, shape)
        self._pools, self._inputs = self._blocks(compiled, request, shape)
        self._sequence = Sequences(self._pools, context, 0).open([])
        self._sequence.reserve(context)

    def _blocks(
        self, compiled: ov.CompiledModel, request: ov.InferRequest, shape: LayerShape
    ) -> tuple[list[BlockPool], BlockInputs]:
        """Return the blocks, and the inputs that say which belong to the sequence."""
        raise NotImplementedError

    def place(self, past: int, end: int) -> None:
        """Hold `past` tokens, and make room for those up to `end`."""
        _place(self._sequence, past, end)

    def step(self, count: int) -> None:
        """Compute `count` tokens after those held."""
        self._inputs.write([(self._sequence, None, None)], self._sequence.num_tokens + count)
        self._tokens.run(count)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(pool.num_bytes for pool in self._pools) // self.repeats


class OwnLayer(_Layer):
    """Our op alone, with the blocks that its pattern holds at the end of a context."""

    impl = "edge"

    def __init__(self, shape: LayerShape, case: Case, context: int) -> None:
        pattern, block_size = case.pattern.of_layer(0), case.pattern.block_size
        size = block_bytes(shape, block_size, KV_TYPE)
        repeats = _repeats(case.pattern.held_tokens(context, shape.num_kv_heads, shape.num_heads) // block_size * size)
        ov_kernels.add_to(core(), required=True)
        tokens = _token_inputs(shape)
        caches = [parameter(cache_input(i), [-1, size], np.uint8) for i in range(repeats)]
        spans = [parameter(name, [-1], np.int32) for name in ("past_lens", "subsequence_begins")]
        table = parameter(block_table_input(0), [-1, -1, -1], np.int32)
        ends = []
        for cache in caches:
            ports = [node.output(0) for node in (*tokens, cache, *spans, table)]
            ends.append(attention_op(ports, shape, pattern, block_size, KV_TYPE, shape.key_size**-0.5).output(0))
        super().__init__(case, repeats, ov.Model(ends, [*tokens, *caches, *spans, table]), shape, context)

    def _blocks(
        self, compiled: ov.CompiledModel, request: ov.InferRequest, shape: LayerShape
    ) -> tuple[list[BlockPool], BlockInputs]:
        layers = AttentionPattern.of_layers(
            [self.case.pattern.of_layer(0)] * self.repeats, self.case.pattern.block_size
        )
        heads = [(shape.num_heads, shape.num_kv_heads)] * self.repeats
        pools = own_pools(compiled, request, BlockAttention(layers, heads))
        return pools, OwnInputs(request, pools)


class StockLayer(_Layer):
    """OpenVINO's PagedAttention alone, which openvino.genai runs; source of its 28 inputs: op/paged_attention.hpp."""

    impl = "genai"

    def __init__(self, shape: LayerShape, case: Case, context: int) -> None:
        repeats = _repeats(context * shape.num_kv_heads * (shape.key_size + shape.value_size))
        tokens = _token_inputs(shape)
        caches = [[_any_parameter(name + str(i)) for name in STOCK_CACHES] for i in range(repeats)]
        names = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
        spans = [parameter(name, [-1], np.int32) for name in names]
        longest = parameter("max_context_len", [], np.int32)
        none, zero = _constant([], np.int32), _constant(0, np.int32)
        floats, sinks = _constant([], np.float32), opset13.constant(np.zeros((0, 0, 0, 0), np.float32))
        scale = _constant(shape.key_size**-0.5, np.float32)
        rest = [*spans, scale, zero, floats, longest, none, none, none, floats, floats, zero, zero]
        rest += [sinks, zero, none, none, none, none, _constant([], np.uint8), none]
        ends = []
        for pair in caches:
            op = ov.op._PagedAttentionExtension([node.output(0) for node in (*tokens, *pair, *rest)])
            facts = op.get_rt_info()
            facts["num_k_heads"] = facts["num_v_heads"] = shape.num_kv_heads
            facts["k_head_size"], facts["v_head_size"] = shape.key_size, shape.value_size
            ends.append(op.output(0))
        model = ov.Model(ends, [*tokens, *(cache for pair in caches for cache in pair), *spans, longest])
        super().__init__(case, repeats, model, shape, context)

    def _blocks(
        self, compiled: ov.CompiledModel, request: ov.InferRequest, shape: LayerShape
    ) -> tuple[list[BlockPool], BlockInputs]:
        pools = stock_pools(compiled, request, "CPU")
        return pools, StockInputs(request, pools)


class WholeModel:
    """A decoder whose layers see what a pattern says, at up to `context` tokens."""

    def __init__(self, impl: str, case: Case, model: PagedModel, context: int) -> None:
        self.impl, self.case, self.repeats, self._model = impl, case, 1, model
        self._sequence = model.sequence()
        self._sequence.reserve(context)
        self._past = 0

    def place(self, past: int, end: int) -> None:
        """Hold `past` tokens, and make room for those up to `end`."""
        _place(self._sequence, past, end)
        self._past = past

    def step(self, count: int) -> None:
        """Compute `count` tokens after those held."""
        advance(self._model, self._sequence, [0] * count)
        kept = self._sequence.rollback(self._past)
        assert kept == self._past, "a step frees nothing that its own tokens see"

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._model.kv_bytes


def _place(sequence: PagedSequence, past: int, end: int) -> None:
    """Let a sequence hold `past` tokens that nobody computes, and have blocks for those up to `end`."""
    sequence.assume(past)
    for table in sequence.tables:
        table.hold(past, end)
        pool = table.pool
        for first in range(0, pool.num_blocks, BLOCKS_AT_ONCE):  # memory that was never written is all one page
            blocks = np.arange(first, min(first + BLOCKS_AT_ONCE, pool.num_blocks))
            pool.memory.copy(np.zeros_like(blocks), blocks)


def _properties() -> dict[str, Any]:
    weights = Weights(num_bytes=1 << 40, kind="int8", has_floats=False)
    return make_plan("CPU", LoadConfig(kv_precision=KV_TYPE), weights).properties


def _token_inputs(shape: LayerShape) -> list[Any]:
    widths = {
        "query": shape.num_heads * shape.key_size,
        "key": shape.num_kv_heads * shape.key_size,
        "value": shape.num_kv_heads * shape.value_size,
    }
    return [parameter(name, [-1, width], np.float32) for name, width in widths.items()]


class _Tokens:
    """The same random tokens for every step of one width."""

    def __init__(self, request: ov.InferRequest, shape: LayerShape) -> None:
        self._request, self._count = request, 0
        self._widths = {node.get_friendly_name(): _width(node) for node in _token_inputs(shape)}

    def run(self, count: int) -> None:
        if count != self._count:
            random, self._count = np.random.default_rng(count), count
            for name, width in self._widths.items():
                values = random.standard_normal((count, width), dtype=np.float32)
                self._request.set_tensor(name, ov.Tensor(values))
            self._request.set_tensor("subsequence_begins", ov.Tensor(np.array([0, count], np.int32)))
        self._request.start_async()
        self._request.wait()


def _repeats(size: int) -> int:
    return min(MOST_REPEATS, max(1, COLD_BYTES // size))


def _width(node: Any) -> int:
    return int(node.output(0).get_partial_shape()[1].get_length())


def _any_parameter(name: str) -> Any:
    made = opset13.parameter(ov.PartialShape.dynamic(4), ov.Type.dynamic, name=name)
    made.output(0).set_names({name})
    return made


def _constant(value: Any, kind: type[np.generic]) -> Any:
    return opset13.constant(np.array(value, kind))
