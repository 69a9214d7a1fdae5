"""Ways to compute attention at a given place of a long context, without having computed what comes before.

Caches are filled with zeros, which no kernel can tell from a text: time does not depend on the numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13

import ov_kernels
from edge_runtime.config import LoadConfig
from edge_runtime.devices import core
from edge_runtime.models.attention import AttentionPattern
from edge_runtime.models.compiling import compile_model
from edge_runtime.models.kv.block_sparse import BlockTable
from edge_runtime.models.kv.stock import STOCK_CACHES, StockCache, aligned_bytes
from edge_runtime.models.paged import PagedModel
from edge_runtime.models.passes.block_sparse_attention import (
    LayerShape,
    attention_op,
    block_bytes,
    cache_input,
    parameter,
)
from edge_runtime.models.plan import make_plan
from edge_runtime.models.weights import Weights

KV_TYPE = "u8"
COLD_BYTES, MOST_REPEATS = 128 << 20, 32
"""A layer is repeated in its graph until its caches have so many bytes: no processor's cache then holds them, and what
a call costs outside is shared out, as among the layers of a model."""
STRIDE_OF_PLACES = 512
"""Tokens that enter a cache at once where none are computed."""


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


class OwnLayer:
    """Our op alone, with the blocks that its pattern holds at the end of a context."""

    impl = "edge"

    def __init__(self, shape: LayerShape, case: Case, context: int) -> None:
        self.case = case
        block_size = case.pattern.block_size
        self._table = BlockTable(case.pattern.of_layer(0), block_size, shape.num_heads, shape.num_kv_heads)
        self._block_bytes, self._held = block_bytes(shape, block_size, KV_TYPE), 0
        held = case.pattern.held_tokens(context, shape.num_kv_heads, shape.num_heads)
        self.repeats = _repeats(held // block_size * self._block_bytes)
        ov_kernels.add_to(core(), required=True)
        tokens = _token_inputs(shape)
        caches = [parameter(cache_input(i), [-1, self._block_bytes], np.uint8) for i in range(self.repeats)]
        spans = [parameter(name, [-1], np.int32) for name in ("past_lens", "subsequence_begins")]
        table = parameter("block_table", [-1, -1, -1], np.int32)
        ends = []
        for cache in caches:
            ports = [node.output(0) for node in (*tokens, cache, *spans, table)]
            pattern, scale = case.pattern.of_layer(0), shape.key_size**-0.5
            ends.append(attention_op(ports, shape, pattern, block_size, KV_TYPE, scale).output(0))
        model = ov.Model(ends, [*tokens, *caches, *spans, table])
        compiled = compile_model(model, "CPU", _properties())
        self._request = compiled.create_infer_request()
        self._tokens = _Tokens(self._request, shape)
        self._past = np.zeros(1, np.int32)
        self._request.set_tensor("past_lens", ov.Tensor(self._past, shared_memory=True))
        self._memory: list[NDArray[np.uint8]] = []

    def place(self, past: int, end: int) -> None:
        """Hold `past` tokens, and make room for those up to `end`."""
        self._table.widen(-(-end // self.case.pattern.block_size))
        for begin in [*range(self._held, past, STRIDE_OF_PLACES), past]:
            until = min(begin + STRIDE_OF_PLACES, past) if begin < past else end
            self._table.hold(begin, until, self._table.resize)
        self._held = end
        self._past[0] = past
        size = self._table.num_blocks * self._block_bytes
        self._memory = []  # before the new one is taken
        self._memory = [_touched(size) for _ in range(self.repeats)]
        shape = ov.Shape([self._table.num_blocks, self._block_bytes])
        for layer, memory in enumerate(self._memory):
            self._request.set_tensor(cache_input(layer), ov.Tensor(memory, shape, ov.Type.u8))
        self._request.set_tensor("block_table", ov.Tensor(self._table.table[None].copy()))

    def step(self, count: int) -> None:
        """Compute `count` tokens after those held."""
        self._tokens.run(count)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._table.num_blocks * self._block_bytes


class StockLayer:
    """OpenVINO's PagedAttention alone, which openvino.genai runs; source of its 28 inputs: op/paged_attention.hpp."""

    impl = "genai"

    def __init__(self, shape: LayerShape, case: Case, context: int) -> None:
        self.case = case
        self.repeats = _repeats(context * shape.num_kv_heads * (shape.key_size + shape.value_size))
        tokens = _token_inputs(shape)
        caches = [[_any_parameter(name + str(i)) for name in STOCK_CACHES] for i in range(self.repeats)]
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
        compiled = compile_model(model, "CPU", _properties())
        self._request = compiled.create_infer_request()
        self._tokens = _Tokens(self._request, shape)
        self._cache = StockCache(compiled, self._request, "CPU")

    def place(self, past: int, end: int) -> None:
        """Hold `past` tokens, and make room for those up to `end`."""
        self._cache.reserve(end)
        for tensor in self._cache.tensors:
            tensor.data.fill(0)
        self._span = past

    def step(self, count: int) -> None:
        """Compute `count` tokens after those held."""
        self._cache.hold(self._span, self._span + count)
        self._tokens.run(count)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(int(tensor.get_byte_size()) for tensor in self._cache.tensors) // self.repeats


class WholeModel:
    """A decoder whose layers see what a pattern says."""

    def __init__(self, impl: str, case: Case, model: PagedModel) -> None:
        self.impl, self.case, self.repeats, self._model = impl, case, 1, model
        self._past = 0

    def place(self, past: int, end: int) -> None:
        """Hold `past` tokens, and make room for those up to `end`."""
        model = self._model
        model.reserve(end)
        for begin in range(model.num_tokens, past, STRIDE_OF_PLACES):
            model.cache.hold(begin, min(begin + STRIDE_OF_PLACES, past))
        model.cache.hold(past, end)
        for tensor in model.cache.tensors:
            tensor.data.fill(0)
        self._past = past
        model.assume(past)

    def step(self, count: int) -> None:
        """Compute `count` tokens after those held."""
        self._model.forward([0] * count, 1)
        kept = self._model.rollback(self._past)
        assert kept == self._past, "a step frees nothing that its own tokens see"

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._model.kv_bytes


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


def _touched(size: int) -> NDArray[np.uint8]:
    memory = aligned_bytes(size)
    memory.fill(0)
    return memory


def _any_parameter(name: str) -> Any:
    made = opset13.parameter(ov.PartialShape.dynamic(4), ov.Type.dynamic, name=name)
    made.output(0).set_names({name})
    return made


def _constant(value: Any, kind: type[np.generic]) -> Any:
    return opset13.constant(np.array(value, kind))
