"""Answers written at once equal those written alone, in float32 token for token, on graphs of several families."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.config import GenerationConfig

LENGTHS = (3, 40, 17, 1, 31)
"""Prompt lengths; a KV block has 32 tokens, so answers cross blocks at different times."""


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_equals_one_by_one(tiny_ir, family, temperature):
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 300, length).tolist() for length in LENGTHS]
    configs = [
        GenerationConfig(
            max_new_tokens=20 + 9 * index, temperature=temperature, seed=index, logprobs=3, top_k=50, ignore_eos=True
        )
        for index in range(len(LENGTHS))
    ]
    alone, together = (EdgeLLM.load(tiny_ir(family), precision="f32") for _ in "ab")
    for ids, config, answer in zip(prompts, configs, together.generate_many(prompts, configs), strict=True):
        wanted = alone.generate(ids, config)
        assert answer.token_ids == wanted.token_ids
        for one, other in zip(answer.logprobs, wanted.logprobs, strict=True):
            assert [token_id for token_id, _ in one.top_logprobs] == [token_id for token_id, _ in other.top_logprobs]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
