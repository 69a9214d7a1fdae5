"""Answers written at once equal those written alone, in float32 token for token, on graphs of several families."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.config import GenerationConfig
from edge_runtime.errors import ConfigError

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


def test_a_saved_prefix_is_held_by_a_model_that_loads_it(tiny_ir, tmp_path, caplog):
    """What cannot be trusted is told in one line, and computed again."""
    prompt, options = list(range(10, 110)), {"max_new_tokens": 8, "num_draft_tokens": 0}
    with EdgeLLM.load(tiny_ir("llama"), precision="f32") as llm:
        wanted = llm.generate(prompt, **options).token_ids
        assert llm.save_prefix(tmp_path / "prefix", prompt) == len(prompt)
        for bad in ("/", 3, tmp_path, tmp_path / "no folder" / "prefix"):
            with pytest.raises(ConfigError):
                llm.save_prefix(bad, prompt)
    with EdgeLLM.load(tiny_ir("llama"), precision="f32") as llm:
        assert llm.load_prefix(tmp_path / "prefix") == len(prompt)
        result = llm.generate(prompt, **options)
        assert (result.token_ids, result.metrics.reused_tokens) == (wanted, len(prompt) - 1)
        (tmp_path / "prefix").write_bytes(b"nothing of ours")
        assert llm.load_prefix(tmp_path / "prefix") == llm.load_prefix(tmp_path / "absent") == 0
    assert len(caplog.records) == 2


@pytest.mark.kernels
@pytest.mark.parametrize("attention", ["stock", "block_sparse"])
def test_two_chats_in_turns_read_only_what_is_new(tiny_ir, attention):
    """Ten rounds; the last token of an answer is the first that has not been read."""
    with EdgeLLM.load(tiny_ir("llama"), precision="f32", attention=attention) as llm:
        texts, held = [[5, 6, 7], [9, 8, 7, 6]], [0, 0]
        for turn in range(10):
            for number, ids in enumerate(texts):
                ids.extend([20 + turn, 40 + number, 60])
                result = llm.generate(ids, max_new_tokens=8, ignore_eos=True)
                assert result.metrics.reused_tokens == held[number]
                ids.extend(result.token_ids)
                held[number] = len(ids) - 1
