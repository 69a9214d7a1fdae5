"""Patterns as an attention of transformers: equal to the mask written out, forward and backward, cached or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_export.hybrid import torch_attention
from edge_export.hybrid.torch_attention import patterned, use_pattern
from edge_export.quiet import quiet
from edge_runtime.models.attention import FULL, AttentionPattern, LayerPattern, longgen, s2

BLOCK, TOKENS = 16, 200
SAME = 1e-5
PATTERNS = {
    "longgen": longgen(2, sink=20, window=48, num_full=1, block_size=BLOCK),
    "s2": s2(2, 2, window=32, stride=2, block_size=BLOCK),
    "by tokens": AttentionPattern.of_layers([LayerPattern(window=37, by_tokens=True), FULL], BLOCK),
}


def load(folder):
    with quiet():
        from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture
def model(tiny_hf):
    return load(tiny_hf("llama"))


IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, TOKENS)))


def written_out(pattern):
    """Return a patch of the attention that masks all keys of all queries at once."""

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        heads, length, total = query.shape[1], query.shape[2], key.shape[2]
        seen = pattern.of_layer(module.layer_idx).token_mask(
            np.arange(total - length, total), total, heads, pattern.block_size
        )
        group = heads // key.shape[1]
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        weights = scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    return attend


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunk", [7, 64, 256])
def test_logits_and_gradients_are_those_of_the_mask(model, tiny_hf, monkeypatch, name, chunk):
    monkeypatch.setattr(torch_attention, "CHUNK", chunk)
    use_pattern(model, PATTERNS[name])
    logits = model(IDS).logits
    logits.square().mean().backward()
    reference = load(tiny_hf("llama"))
    monkeypatch.setattr(torch_attention, "_attend", written_out(PATTERNS[name]))
    use_pattern(reference, PATTERNS[name])
    wanted = reference(IDS).logits
    wanted.square().mean().backward()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=SAME * float(wanted.detach().abs().max()))
    for (_, mine), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-4 * float(other.grad.abs().max()))


@pytest.mark.parametrize(
    "pattern",
    [
        AttentionPattern.of_layers([FULL] * 2, BLOCK),
        longgen(2, sink=0, window=208, num_full=0, block_size=BLOCK),
    ],
    ids=["all full", "window of the whole text"],
)
def test_seeing_everything_is_the_model_itself(model, pattern):
    wanted = model(IDS).logits
    use_pattern(model, pattern)
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=SAME * float(wanted.detach().abs().max()))


def test_a_window_changes_the_model(model):
    wanted = model(IDS).logits
    use_pattern(model, PATTERNS["longgen"])
    assert not torch.allclose(model(IDS).logits[:, -1], wanted[:, -1], atol=1e-2)


def test_a_cache_gives_the_same(model):
    """Token by token after a prompt, with transformers' own cache."""
    use_pattern(model, PATTERNS["longgen"])
    wanted = model(IDS[:1]).logits[0, 150:]
    cached = model(IDS[:1, :150], use_cache=True)
    rows, past = [], cached.past_key_values
    for place in range(150, 160):
        made = model(IDS[:1, place : place + 1], past_key_values=past, use_cache=True)
        rows.append(made.logits[0, 0])
        past = made.past_key_values
    torch.testing.assert_close(torch.stack(rows), wanted[:10], rtol=0, atol=SAME * float(wanted.detach().abs().max()))


def test_a_pattern_is_taken_back(model):
    wanted = model(IDS).logits
    with patterned(model, PATTERNS["s2"]):
        assert not torch.equal(model(IDS).logits, wanted)
    assert torch.equal(model(IDS).logits, wanted)
    assert not hasattr(model.config, "edge_attention")
