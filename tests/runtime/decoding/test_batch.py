"""Answers written at once equal those written alone, in float32 token for token."""

from __future__ import annotations

import numpy as np
import pytest
from edge_runtime.decoding.batch import MOST_SEQUENCES, most_sequences, write_batch

from edge_runtime.api import EdgeLLM
from edge_runtime.config import GenerationConfig
from edge_runtime.errors import LogitsError
from tests.tiny_models import SENTENCES

LENGTHS = (3, 40, 17, 1, 31)
"""Of the prompts; a cache block has 32 tokens, so answers cross blocks at different times."""


def prompts():
    random = np.random.default_rng(0)
    return [random.integers(3, 300, length).tolist() for length in LENGTHS]


def load(folder):
    return EdgeLLM.load(folder, precision="f32")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_equals_one_by_one(tiny_ir, family, temperature):
    folder = tiny_ir(family)
    configs = [
        GenerationConfig(max_new_tokens=20 + 9 * index, temperature=temperature, seed=index, logprobs=3, top_k=50)
        for index in range(len(LENGTHS))
    ]
    alone, batched = load(folder), load(folder)
    made = write_batch(batched.engine.target.model, prompts(), configs)
    for ids, config, answer in zip(prompts(), configs, made, strict=True):
        names = ("max_new_tokens", "temperature", "seed", "logprobs", "top_k")
        wanted = alone.generate(ids, ignore_eos=True, **{name: getattr(config, name) for name in names})
        assert answer.token_ids == wanted.token_ids
        assert [[i for i, _ in top] for top in answer.top_logprobs] == [
            [i for i, _ in token.top_logprobs] for token in wanted.logprobs
        ]


def test_a_stop_token_ends_its_answer_alone(tiny_ir):
    llm = load(tiny_ir("llama"))
    config = GenerationConfig(max_new_tokens=30)
    free = write_batch(llm.engine.target.model, prompts(), [config] * len(LENGTHS))
    stop = free[1].token_ids[4]
    ended = write_batch(llm.engine.target.model, prompts(), [config] * len(LENGTHS), {stop})
    for answer, whole in zip(ended, free, strict=True):
        ids = whole.token_ids
        assert answer.token_ids == (ids[: ids.index(stop) + 1] if stop in ids else ids)
        assert answer.is_done


def test_number_of_sequences_follows_from_their_memory(tiny_ir, monkeypatch):
    model = load(tiny_ir("llama")).engine.target.model
    assert most_sequences(model, 100) == MOST_SEQUENCES
    monkeypatch.setattr(
        "edge_runtime.decoding.batch.MOST_KV_BYTES", 3 * model.blocks_for(100) * model.cache.block_bytes
    )
    assert most_sequences(model, 100) == 3
    assert most_sequences(model, 10_000) == 1


def test_sentences_of_text(tiny_ir):
    """Prompts that a tokenizer makes, of a batch of one."""
    llm = load(tiny_ir("llama"))
    ids = llm.tokenizer.encode(SENTENCES[0])
    (made,) = write_batch(load(tiny_ir("llama")).engine.target.model, [ids], [GenerationConfig(max_new_tokens=8)])
    assert made.token_ids == llm.generate(ids, max_new_tokens=8, ignore_eos=True).token_ids


def test_forbidding_every_token_is_an_error(tiny_ir):
    """The batch after it is written as by a fresh model."""
    llm = load(tiny_ir("llama"))
    model, free = llm.engine.target.model, GenerationConfig(max_new_tokens=8)
    nothing = GenerationConfig(temperature=1.0, logit_bias=dict.fromkeys(range(model.vocab_size), float("-inf")))
    with pytest.raises(LogitsError, match="the options forbid every token"):
        write_batch(model, prompts()[:2], [free, nothing])
    made = write_batch(model, prompts(), [free] * len(LENGTHS))
    wanted = write_batch(load(tiny_ir("llama")).engine.target.model, prompts(), [free] * len(LENGTHS))
    assert [answer.token_ids for answer in made] == [answer.token_ids for answer in wanted]
