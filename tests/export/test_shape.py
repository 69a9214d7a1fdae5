"""A draft's shape: the parameters asked for, in few layers."""

from __future__ import annotations

import pytest

from edge_export.fastdraft.shape import count_parameters, draft_config
from edge_export.quiet import hide_packages
from edge_runtime.errors import ConfigError

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config(**options):
    hide_packages()
    return draft_config(context_length=1024, special_tokens=SPECIAL, **options)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_count_is_that_of_the_model(tie_embeddings):
    made = config(num_parameters=1e6, vocab_size=2048, tie_embeddings=tie_embeddings)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(made)
    counted = count_parameters(made.hidden_size, made.num_hidden_layers, 2048, tie_embeddings)
    assert model.num_parameters() == counted
    assert 0.5e6 < counted < 1.6e6


def test_the_released_drafts_shape_is_found_from_its_budget():
    """52.1 M parameters for a vocabulary of 32 064, untied: 6 layers of width 512, as Phi-3's FastDraft has."""
    made = config(num_parameters=52.1e6, vocab_size=32064, tie_embeddings=False)
    assert (made.num_hidden_layers, made.hidden_size, made.intermediate_size) == (6, 512, 1408)


def test_depth_is_kept_where_it_is_given():
    shallow, deep = (config(num_parameters=20e6, num_layers=n, vocab_size=8192) for n in (1, 8))
    assert (shallow.num_hidden_layers, deep.num_hidden_layers) == (1, 8)
    assert shallow.hidden_size > deep.hidden_size


def test_a_budget_too_small_for_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="1,000,000 parameters are too few for a vocabulary of 151,646"):
        config(num_parameters=1e6, vocab_size=151646)
