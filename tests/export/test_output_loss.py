"""A loss without logits in memory equals torch's with them, gradients too."""

from __future__ import annotations

import pytest
import torch

from edge_export import output_loss
from edge_export.output_loss import PLAIN_HEADS, mean_loss
from edge_export.quiet import quiet
from edge_export.train import next_token_loss
from tests.tiny_models import make_hf_model


def load(folder):
    with quiet():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.fixture
def case(tiny_hf):
    torch.manual_seed(0)
    return load(tiny_hf("llama")), torch.randint(300, (3, 20))


@pytest.mark.parametrize("block", [1, 500, 1 << 20])
def test_blocks_of_any_size_give_the_same(case, block, monkeypatch):
    monkeypatch.setattr(output_loss, "BLOCK_ELEMENTS", block)
    model, ids = case
    ours, theirs = next_token_loss(model, ids), model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(3 * ours, model), gradients(3 * theirs, model))


def test_only_positions_that_count_have_a_loss(case):
    model, ids = case
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[1, 4] = counts[2, 7] = True
    labels = torch.tensor([5, 6])

    def loss_of_rows(logits, rows):
        return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")

    logits = model(input_ids=ids).logits
    theirs = torch.nn.functional.cross_entropy(torch.stack([logits[1, 4], logits[2, 7]]), labels)
    torch.testing.assert_close(mean_loss(model, ids, counts, loss_of_rows), theirs)


def test_autocast_computes_in_bf16_and_keeps_f32_gradients(case, monkeypatch):
    """As the logits' way does under the same autocast, so that only the output layer's own rounding differs."""
    model, ids = case
    with torch.autocast("cpu", torch.bfloat16):
        ours = next_token_loss(model, ids)
        monkeypatch.setattr(output_loss, "PLAIN_HEADS", ())
        theirs = next_token_loss(model, ids)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
    for one, other in zip(gradients(ours, model), gradients(theirs, model), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=5e-3, rtol=0.2)


def test_a_model_of_another_family_goes_through_its_logits(case, monkeypatch):
    model, ids = case
    monkeypatch.setattr(output_loss, "PLAIN_HEADS", ())
    torch.testing.assert_close(next_token_loss(model, ids), model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PLAIN_HEADS)
def test_a_model_of_a_plain_head_has_the_loss_that_transformers_says(name, tied, tmp_path):
    torch.manual_seed(0)
    model, ids = load(make_hf_model(name, tmp_path, tie_word_embeddings=tied)), torch.randint(300, (3, 20))
    ours, theirs = next_token_loss(model, ids), model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, model), gradients(theirs, model))
