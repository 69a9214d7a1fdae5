"""The op BlockSparseAttention through OpenVINO's CPU plugin, every instruction set against numpy.

numpy attends in f64 with the mask of `LayerPattern.token_mask`, the definition. The cache is the caller's memory: it is
written in place, block tables name blocks in random order, and blocks that nobody sees are missing.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray

import ov_kernels
from edge_runtime.models.attention import FULL, LayerPattern
from edge_runtime.models.passes.block_sparse_attention import LayerShape, attention_op, parameter

pytestmark = pytest.mark.kernels

BOUNDS = {"f32": 1e-5, "bf16": 1e-2, "u8": 2e-2}
"""Of max |error| / max |y| in f32; of rms error / rms y where keys and values are rounded."""
PATTERNS = {
    "full": FULL,
    "window": LayerPattern(window=64),
    "sink and window": LayerPattern(window=64, sink=40),
    "tokens": LayerPattern(window=45, by_tokens=True),
    "strided": LayerPattern(window=32, stride=3, offsets=(0, 1)),
    "a shard a query head": LayerPattern(window=32, stride=4, offsets=(0, 1, 2, 3), num_dense_heads=1),
}
SHAPE = LayerShape(4, 2, 64, 64)


@dataclass
class Attention:
    """The op with a cache of its own, for some sequences.

    Attributes:
        table: (B, H_kv, n) physical blocks, -1 where missing.
    """

    pattern: LayerPattern
    shape: LayerShape = SHAPE
    block_size: int = 32
    kept_as: str = "f32"
    sequences: int = 1
    blocks: int = 24
    threads: int | None = None
    table: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        kv_heads, value = self.shape.num_kv_heads, self.shape.value_size
        size = ov_kernels.attention_block_bytes(self.block_size, self.shape.key_size, value, self.kept_as)
        self.compile(self.model(size))
        count = self.sequences * kv_heads * self.blocks
        self.table = np.random.default_rng(1).permutation(count).astype(np.int32)
        self.table = self.table.reshape(self.sequences, kv_heads, self.blocks)
        self.cache = np.full((count, size), 0x7F, np.uint8)  # not numbers, wherever nothing was written

    def model(self, size: int) -> ov.Model:
        heads, kv_heads, key, value = self.shape
        widths = {"query": heads * key, "key": kv_heads * key, "value": kv_heads * value}
        inputs = [parameter(name, [-1, width], np.float32) for name, width in widths.items()]
        inputs.append(parameter("cache", [-1, size], np.uint8))
        inputs += [parameter(name, [-1], np.int32) for name in ("past", "begins")]
        inputs.append(parameter("table", [-1, -1, -1], np.int32))
        ports = [node.output(0) for node in inputs]
        op = attention_op(ports, self.shape, self.pattern, self.block_size, self.kept_as, key**-0.5)
        return ov.Model([op.output(0)], inputs)

    def compile(self, model: Any) -> None:
        """Use this model, or the IR at this path."""
        core = ov.Core()
        ov_kernels.add_to(core, required=True)
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if self.threads:
            config["INFERENCE_NUM_THREADS"] = self.threads
        self.request = core.compile_model(model, "CPU", config).create_infer_request()

    def run(self, tokens: list[NDArray[np.float32]], past: list[int], rows: list[int]) -> NDArray[np.float32]:
        """Return (T, H, V) for query, key and value of `rows` new tokens of each sequence after `past`."""
        begins = np.cumsum([0, *rows]).astype(np.int32)
        for name, values in zip(("query", "key", "value"), tokens, strict=True):
            self.request.set_tensor(name, ov.Tensor(np.ascontiguousarray(values)))
        self.request.set_tensor("cache", ov.Tensor(self.cache, shared_memory=True))
        self.request.set_tensor("past", ov.Tensor(np.array(past, np.int32)))
        self.request.set_tensor("begins", ov.Tensor(begins))
        self.request.set_tensor("table", ov.Tensor(np.ascontiguousarray(self.table)))
        self.request.infer()
        made: NDArray[np.float32] = self.request.get_output_tensor(0).data.copy()
        return made.reshape(-1, self.shape.num_heads, self.shape.value_size)


def draw(count: int, shape: LayerShape, seed: int = 0) -> list[NDArray[np.float32]]:
    """Return query, key and value of a sequence."""
    random = np.random.default_rng(seed)
    sizes = (shape.num_heads * shape.key_size, shape.num_kv_heads * shape.key_size)
    widths = (*sizes, shape.num_kv_heads * shape.value_size)
    return [random.standard_normal((count, width), dtype=np.float32) for width in widths]


def expected(tokens: list[NDArray[np.float32]], pattern: LayerPattern, shape: LayerShape, size: int) -> NDArray[Any]:
    heads, kv_heads, key_size, value_size = shape
    count, group = len(tokens[0]), heads // kv_heads
    query, key = (values.reshape(count, -1, key_size).astype(np.float64) for values in tokens[:2])
    value = tokens[2].reshape(count, kv_heads, value_size).astype(np.float64)
    scores = np.einsum("thd,shd->hts", query, np.repeat(key, group, 1)) * key_size**-0.5
    mask = pattern.token_mask(np.arange(count), count, heads, size)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, np.repeat(value, group, 1))


def in_parts(op: Attention, tokens: list[NDArray[np.float32]], sizes: list[int]) -> NDArray[np.float32]:
    made, past, turn = [], 0, 0
    while past < len(tokens[0]):
        rows = min(sizes[turn % len(sizes)], len(tokens[0]) - past)
        made.append(op.run([values[past : past + rows] for values in tokens], [past], [rows]))
        past, turn = past + rows, turn + 1
    return np.concatenate(made)


def assert_near(got: NDArray[Any], wanted: NDArray[Any], kept_as: str = "f32") -> None:
    if kept_as == "f32":
        assert np.abs(got - wanted).max() <= BOUNDS["f32"] * np.abs(wanted).max()
    else:
        assert np.square(got - wanted).mean() <= BOUNDS[kept_as] ** 2 * np.square(wanted).mean()


@pytest.mark.parametrize("sizes", [[1], [5], [8, 1], [100], [300]], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_equals_the_mask(isa, name, sizes):
    """Token by token, as drafts are verified, and as prompts are read, from an empty cache on."""
    tokens, pattern = draw(300, SHAPE), PATTERNS[name]
    assert_near(in_parts(Attention(pattern), tokens, sizes), expected(tokens, pattern, SHAPE, 32))


@pytest.mark.parametrize("kept_as", ["bf16", "u8"])
@pytest.mark.parametrize("name", ["full", "sink and window", "a shard a query head"])
def test_rounded_keys_and_values(isa, name, kept_as):
    tokens, pattern = draw(260, SHAPE), PATTERNS[name]
    wanted = expected(tokens, pattern, SHAPE, 32)
    assert_near(in_parts(Attention(pattern, kept_as=kept_as), tokens, [90, 5, 1]), wanted, kept_as)


@pytest.mark.parametrize("kept_as", BOUNDS)
@pytest.mark.parametrize(
    "shape",
    [LayerShape(1, 1, 16, 16), LayerShape(6, 2, 80, 48), LayerShape(16, 2, 128, 128), LayerShape(3, 3, 256, 64)],
    ids=str,
)
@pytest.mark.parametrize("block_size", [16, 128])
def test_every_shape(isa, shape, block_size, kept_as):
    """Groups of 1 to 8 heads, values of another size than keys."""
    pattern = LayerPattern(window=128, sink=5, stride=2)
    tokens = draw(200, shape)
    op = Attention(pattern, shape, block_size, kept_as)
    wanted = expected(tokens, pattern, shape, block_size)
    assert_near(in_parts(op, tokens, [150, 3, 1]), wanted, kept_as)


def test_several_sequences_of_different_lengths(isa):
    """One of them empty in the second call."""
    pattern = PATTERNS["sink and window"]
    op = Attention(pattern, sequences=3)
    sequences = [draw(count, SHAPE, seed=count) for count in (70, 130, 9)]
    first = op.run([np.concatenate([s[i][:n] for s, n in zip(sequences, (60, 130, 3), strict=True)]) for i in range(3)],
                   [0, 0, 0], [60, 130, 3])  # fmt: skip
    second = op.run([np.concatenate([sequences[0][i][60:], sequences[2][i][3:]]) for i in range(3)],
                    [60, 130, 3], [10, 0, 6])  # fmt: skip
    wanted = [expected(s, pattern, SHAPE, 32) for s in sequences]
    assert_near(first, np.concatenate([wanted[0][:60], wanted[1], wanted[2][:3]]))
    assert_near(second, np.concatenate([wanted[0][60:], wanted[2][3:]]))


def test_long_contexts_are_shared_out_in_ranges(isa):
    """More than 32 blocks: partial results are added up, also where a token sees only some of the ranges."""
    for pattern in (FULL, LayerPattern(window=32, stride=2, offsets=(0, 1))):
        tokens = draw(1300, SHAPE)
        op = Attention(pattern, block_size=16, blocks=90)
        got = in_parts(op, tokens, [1290, 5, 1])
        assert_near(got[1280:], expected(tokens, pattern, SHAPE, 16)[1280:])


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_threads_do_not_change_a_bit(isa, rows):
    made = []
    for threads in (1, 2):
        tokens = draw(700 + rows, SHAPE)
        op = Attention(FULL, block_size=16, kept_as="u8", blocks=80, threads=threads)
        made.append(in_parts(op, tokens, [700, rows]))
    assert np.array_equal(*made)


def test_a_block_that_is_seen_and_missing_gives_no_number(isa):
    """And harms no row that does not see it; one that nobody sees may be missing."""
    pattern = LayerPattern(window=64, stride=4, offsets=(0, 1))
    tokens = draw(300, SHAPE)
    wanted = expected(tokens, pattern, SHAPE, 32)
    op = Attention(pattern)
    in_parts(op, [values[:299] for values in tokens], [299])
    held = pattern.held_blocks(300, 2, 4, 32)
    op.table[0][:, : held.shape[1]][~held] = -1
    last = [values[299:] for values in tokens]
    assert_near(op.run(last, [299], [1]), wanted[299:])
    op.table[0, 1, 3] = 10_000  # head 1 sees blocks 3 and 7
    got = op.run(last, [299], [1])
    assert np.isnan(got[:, 2:]).all()
    assert_near(got[:, :2], wanted[299:, :2])


def test_only_seen_blocks_are_read():
    """A kernel that streams everything would be told by its bytes."""
    library = ctypes.CDLL(str(ov_kernels.library_path()))
    library.edge_attention_bytes_read.restype = ctypes.c_uint64
    tokens, pattern = draw(600, SHAPE), LayerPattern(window=64, sink=32, stride=5, offsets=(0, 1))
    op = Attention(pattern)
    in_parts(op, [values[:599] for values in tokens], [599])
    before = library.edge_attention_bytes_read()
    op.run([values[599:] for values in tokens], [599], [1])
    read = library.edge_attention_bytes_read() - before
    assert read == pattern.held_blocks(600, 2, 4, 32).sum() * op.cache.shape[1]


def test_what_a_rejected_token_left_does_not_matter(isa):
    """Not even where it was no number: the slots behind the last token may hold anything."""
    for kept_as in BOUNDS:
        tokens = draw(50, SHAPE)
        op = Attention(FULL, kept_as=kept_as)
        clean = in_parts(op, tokens, [40, 1])
        wrong = [np.full_like(values[:8], np.nan) for values in tokens]
        again = Attention(FULL, kept_as=kept_as)
        in_parts(again, [values[:40] for values in tokens], [40])
        assert np.isnan(again.run(wrong, [40], [8])).all()
        rest = [again.run([values[i : i + 1] for values in tokens], [i], [1]) for i in range(40, 50)]
        assert np.array_equal(np.concatenate(rest), clean[40:])


@pytest.mark.parametrize("kept_as", BOUNDS)
def test_no_numbers_stay_in_their_rows(isa, kept_as):
    """A query, a key or a value that is none spoils what depends on it and nothing else."""
    tokens = draw(20, SHAPE)
    tokens[0][3] = np.nan
    tokens[1][9, :64] = np.inf
    got = Attention(FULL, kept_as=kept_as).run(tokens, [0], [20])
    bad = np.isnan(got).any(-1)
    assert bad[3].all()
    assert bad[9:, :2].all()
    assert not bad[:3].any()
    assert not bad[4:9].any()
    assert not bad[9:, 2:].any()


@pytest.mark.parametrize(
    ("past", "begins"), [([-1], [0, 1]), ([10_000], [0, 1]), ([2**31 - 1], [0, 1]), ([0], [0, 5]), ([0], [1, 1])]
)
def test_inputs_that_contradict_each_other_give_no_number(isa, past, begins):
    op, tokens = Attention(FULL), draw(1, SHAPE)
    op.run(tokens, [0], [1])
    op.request.set_tensor("past", ov.Tensor(np.array(past, np.int32)))
    op.request.set_tensor("begins", ov.Tensor(np.array(begins, np.int32)))
    op.request.infer()
    assert np.isnan(op.request.get_output_tensor(0).data).all()


def test_no_tokens_at_all(isa):
    assert Attention(FULL).run(draw(0, SHAPE), [0], [0]).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("shape", "block_size", "kept_as", "told"),
    [
        (LayerShape(4, 2, 60, 64), 32, "f32", "multiples of 16"),
        (LayerShape(4, 2, 272, 64), 32, "f32", "up to 256"),
        (LayerShape(5, 2, 64, 64), 32, "f32", "5 heads and 2 KV heads"),
        (LayerShape(4, 2, 64, 64), 24, "f32", "block_size 24"),
        (LayerShape(4, 2, 64, 64), 32, "u4", "kv_type u4"),
    ],
)
def test_what_the_op_cannot_do_is_refused_when_it_is_made(shape, block_size, kept_as, told):
    with pytest.raises(RuntimeError, match=told):
        Attention(FULL, shape, block_size, kept_as)


@pytest.mark.parametrize("name", PATTERNS)
def test_it_survives_the_ir(tmp_path, name):
    """Every attribute, written and read again."""
    tokens, op = draw(200, SHAPE), Attention(PATTERNS[name])
    ov.save_model(op.model(op.cache.shape[1]), tmp_path / "op.xml", compress_to_fp16=False)
    op.compile(tmp_path / "op.xml")
    assert_near(in_parts(op, tokens, [200]), expected(tokens, PATTERNS[name], SHAPE, 32))
