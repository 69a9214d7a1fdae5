"""What a layer's queries see: the definition, what follows from it, and the recipes of the papers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.models.attention import FULL, AttentionPattern, LayerPattern, longgen, s2

SHORT = LayerPattern(window=128, sink=70, stride=3, offsets=(0, 1))
PATTERNS = [
    FULL,
    LayerPattern(window=64),
    LayerPattern(window=128, sink=10),
    LayerPattern(window=100, by_tokens=True),
    LayerPattern(window=64, stride=4, offsets=(0, 1, 2, 3)),
    LayerPattern(window=64, stride=4, offsets=(1, 2), num_dense_heads=1),
    SHORT,
]


def block_mask(pattern: LayerPattern, num_blocks: int, head: int = 0, num_heads: int = 1) -> np.ndarray:
    """Return which blocks the last query of each block sees."""
    queries = np.arange(num_blocks) * 64 + 63
    return pattern.token_mask(queries, num_blocks * 64, num_heads, 64)[head, :, ::64].astype(int)


def test_strided_pattern_is_the_authors():
    """dkernel, tests/test_utils.py: local 2, stride 3, one head."""
    rows = "10000000 11000000 11100000 10110000 10011000 10011100 10010110 10010011"
    wanted = [[int(bit) for bit in row] for row in rows.split()]
    assert block_mask(LayerPattern(window=128, stride=3), 8).tolist() == wanted


def test_offset_of_one_is_the_other_convention():
    """vLLM takes (j + h + 1) % stride: head 0 keeps the last block of each stride, not the first."""
    assert block_mask(LayerPattern(window=64, stride=4, offsets=(1,)), 6)[5].tolist() == [0, 0, 0, 1, 0, 1]


def test_window_by_blocks_counts_the_current_block():
    mask = LayerPattern(window=128).token_mask(np.array([127, 128, 191]), 192, 1, 64)[0]
    assert [row.argmax() for row in mask] == [0, 64, 64]


def test_window_by_tokens_is_that_of_transformers():
    """j > i - W."""
    mask = LayerPattern(window=5, by_tokens=True).token_mask(np.array([3, 9]), 12, 1, 64)[0]
    assert [np.flatnonzero(row).tolist() for row in mask] == [[0, 1, 2, 3], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_key_that_is_unseen_once_is_never_seen_again(pattern):
    """Else a cache that freed it would be wrong; and each query sees itself."""
    mask = pattern.token_mask(np.arange(700), 700, 4, 64)
    past = np.tril(np.ones((700, 700), bool))
    comes_back = mask[:, 1:] & ~mask[:, :-1] & past[:-1]
    assert not comes_back.any()
    assert mask[:, np.arange(700), np.arange(700)].all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 500, 640])
def test_held_blocks_are_those_that_are_seen(pattern, num_tokens):
    """From the last token on: no block too many, none too few."""
    mask = pattern.token_mask(np.array([num_tokens - 1]), num_tokens, 4, 64)[:, 0]
    blocks = -(-num_tokens // 64)
    padded = np.pad(mask, ((0, 0), (0, blocks * 64 - num_tokens))).reshape(2, 2, blocks, 64)
    assert np.array_equal(pattern.held_blocks(num_tokens, 2, 4, 64), padded.any(axis=(1, 3)))


def test_longgen_keeps_what_the_paper_says():
    """-62 % of the keys and values of 32 layers at 128K with 2048 tokens kept: 12 full layers, 10 to 21."""
    pattern = longgen(32)
    assert pattern.groups == [(*range(10), *range(22, 32)), tuple(range(10, 22))]
    dense = 32 * 32 * 131_072
    assert pattern.held_tokens(131_072, 32, 32) / dense == 12 / 32 + 20 / 32 * 2048 / 131_072


@pytest.mark.parametrize(("layers", "full"), [(6, 2), (9, 3), (28, 10), (1, 1), (2, 2)])
def test_longgen_has_its_full_layers_in_the_middle(layers, full):
    is_full = [longgen(layers).of_layer(i).is_full for i in range(layers)]
    first = is_full.index(True)
    assert sum(is_full) == full == sum(is_full[first : first + full])
    assert abs(first - (layers - first - full)) <= 1


@pytest.mark.parametrize(("layers", "kv_heads", "stride"), [(2, 8, 8), (3, 4, 3), (8, 8, 64), (5, 2, 8)])
def test_heads_of_s2_see_the_whole_context_together(layers, kv_heads, stride):
    """With more shards than heads, together with the layers after."""
    pattern = s2(layers, kv_heads, window=64, stride=stride)
    seen = np.zeros(200, bool)
    for layer in range(layers):
        seen |= pattern.of_layer(layer).held_blocks(200 * 64, kv_heads, kv_heads, 64).any(axis=0)
    assert seen.all()


def test_s2_that_leaves_blocks_unseen_is_refused():
    with pytest.raises(ConfigError, match="a stride of at most 16"):
        s2(2, 8, stride=17)
    assert s2(2, 8, stride=17, dense_every=2).of_layer(1).is_full


def test_s2_can_have_dense_layers_between():
    assert [s2(4, 8, dense_every=2).of_layer(i).is_full for i in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("pattern", [longgen(6), s2(3, 4, stride=8), longgen(9, stride=16, num_full=2)], ids=str)
def test_a_pattern_survives_json(pattern):
    assert AttentionPattern.from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LayerPattern(window=0), "window is 0 tokens, expected at least 1"),
        (lambda: LayerPattern(sink=4), "need a window"),
        (lambda: LayerPattern(window=64, stride=-1), "stride is -1, expected 0 or more"),
        (lambda: LayerPattern(window=64, offsets=()), "expected one or more"),
        (lambda: LayerPattern(window=64, offsets=(0, 1, 2)).check(8, 4), "3 offsets for 4 KV heads of 8 heads"),
        (lambda: LayerPattern(window=64, num_dense_heads=9).check(8, 4), "9 dense heads, expected at most the 8"),
        (lambda: longgen(6, window=100), "window is 100 tokens, expected a multiple of the block size 64"),
        (lambda: longgen(6, num_full=7), "7 full layers, expected 0 to 6"),
        (lambda: longgen(6, block_size=48), "block size is 48, expected one of"),
        (lambda: AttentionPattern(block_size=64, patterns=(FULL,), layers=(0, 1)), "expected every number from 0 to 0"),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(ConfigError, match=told):
        make()
