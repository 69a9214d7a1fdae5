"""The cross-entropy without logits in memory equals torch's, gradients too."""

from __future__ import annotations

import pytest
import torch

from edge_export import linear_loss
from edge_export.linear_loss import linear_cross_entropy
from edge_export.quiet import quiet
from edge_export.train import PLAIN_HEADS, next_token_loss

with quiet():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SMALL = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "llama": lambda tied: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            **SMALL,
        )
    ),
    "gpt2": lambda tied: GPT2LMHeadModel(
        GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            tie_word_embeddings=tied,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **SMALL,
        )
    ),
}


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(37, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    return states, weight, torch.randint(50, (37,), generator=generator)


@pytest.mark.parametrize("block", [1, 500, 1 << 20])
def test_equals_torch_in_blocks_of_any_size(data, block, monkeypatch):
    monkeypatch.setattr(linear_loss, "BLOCK_ELEMENTS", block)
    states, weight, labels = data
    ours, theirs = linear_cross_entropy(*data), torch.nn.functional.cross_entropy(states @ weight.T, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(3 * ours, data[:2]), gradients(3 * theirs, data[:2]))


def test_large_logits_do_not_overflow(data):
    states, weight, labels = data
    ours = linear_cross_entropy(states * 1e3, weight, labels)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(states * 1e3 @ weight.T, labels))


def test_autocast_computes_in_bf16_and_keeps_f32_gradients(data):
    states, weight, labels = data
    theirs = torch.nn.functional.cross_entropy(states @ weight.T, labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(*data)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
    for one, other in zip(gradients(ours, data[:2]), gradients(theirs, data[:2]), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=5e-3, rtol=0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PLAIN_HEADS)
def test_a_model_of_a_plain_head_has_the_loss_that_transformers_says(name, tied):
    torch.manual_seed(0)
    model, ids = MODELS[name](tied), torch.randint(50, (3, 20))
    ours, theirs = next_token_loss(model, ids), model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, model.parameters()), gradients(theirs, model.parameters()))
