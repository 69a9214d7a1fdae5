"""What layers see, in a user's words and in Hugging Face configs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edge_export.hybrid.patterns import check_fits, of_config, parse_pattern
from edge_runtime.errors import ConfigError
from edge_runtime.models.attention import FULL, AttentionPattern, LayerPattern, longgen, s2


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("longgen", longgen(6)),
        ("longgen:window=960,sink=64,full=4", longgen(6, window=960, sink=64, num_full=4)),
        ("longgen:window=64,sink=0,stride=16", longgen(6, window=64, sink=0, stride=16)),
        ("s2:window=1024,stride=4", s2(6, 4, window=1024, stride=4)),
        ("s2:stride=32,dense_every=2", s2(6, 4, stride=32, dense_every=2)),
        ("s2:block=16,window=32,stride=4", s2(6, 4, window=32, stride=4, block_size=16)),
        ("window:window=128,sink=5", AttentionPattern.of_layers([LayerPattern(window=128, sink=5)] * 6)),
    ],
)
def test_words_are_recipes(words, wanted):
    assert parse_pattern(words, 6, 4) == wanted


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("longen", "attention is `longen`, expected one of longgen, s2, window"),
        ("longgen:windows=64", "longgen has no `windows`, it has window, sink"),
        ("longgen:window=2k", "window is `2k`, expected a whole number"),
        ("longgen:window=100", "expected a multiple of the block size 64"),
        ("longgen:full=9", "9 full layers, expected 0 to 6"),
        ("s2:stride=100", "a stride of at most 24"),
        ("s2:block=48", "block size is 48"),
        ("window", "needs a size"),
        ("longgen:full=6", "leaves all 6 layers full"),
        ("s2:dense_every=1", "leaves all 6 layers full"),
    ],
)
def test_what_cannot_be_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        parse_pattern(words, 6, 4)


def config(**entries: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{"num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 4096, **entries}
    )


def test_sliding_layers_are_windows_by_tokens():
    kinds = ["sliding_attention", "full_attention"] * 2
    local = LayerPattern(window=512, by_tokens=True)
    found = of_config(config(sliding_window=512, layer_types=kinds))
    assert found == AttentionPattern.of_layers([local, FULL, local, FULL])
    assert of_config(config(sliding_window=512)) == AttentionPattern.of_layers([local] * 4)


@pytest.mark.parametrize(
    "entries",
    [{}, {"sliding_window": None}, {"sliding_window": 4096}, {"sliding_window": 512, "use_sliding_window": False}],
)
def test_dense_models_have_no_pattern(entries):
    assert of_config(config(**entries)) is None


def test_our_own_entry_is_read():
    assert of_config(config(edge_attention=longgen(4).to_json())) == longgen(4)


def test_phi3_small_is_what_its_code_says():
    """vLLM: heads slide by one block each, (j + h + 1) % 8 == 0; every second layer is dense; blocks of 64."""
    sparse = {"blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16, "blocksparse_vert_stride": 8}
    found = of_config(config(num_attention_heads=32, num_key_value_heads=8, dense_attention_every_n_layers=2, **sparse))
    assert [found.of_layer(i).is_full for i in range(4)] == [False, True, False, True]
    layer = found.of_layer(0)
    mask = layer.token_mask(np.array([40 * 64 + 63]), 41 * 64, 32, 64)[:, 0, ::64]
    for head in range(32):
        wanted = [j for j in range(41) if 40 - j < 16 or (j + head + 1) % 8 == 0]
        assert np.flatnonzero(mask[head]).tolist() == wanted
    kept = layer.held_blocks(41 * 64, 8, 32, 64)[:, :25]
    assert kept.mean() == pytest.approx(0.5, abs=0.03)  # four heads of a group use four of eight shards


def test_a_pattern_of_another_model_is_refused():
    with pytest.raises(ConfigError, match="has 6 layers, but the model has 4"):
        check_fits(longgen(6), config())
