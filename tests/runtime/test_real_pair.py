"""Models that somebody else trained: real text, real disagreement between target and draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.api import EdgeLLM

NUM_PROMPTS = 3
OPTIONS = {"max_new_tokens": 150}


@pytest.fixture(scope="module")
def sources(shared_data) -> dict[str, Path]:
    return {name: shared_data / "models" / f"babyllama-{name}" for name in ("target", "draft")}


@pytest.fixture(scope="module")
def pair(sources, tmp_path_factory) -> EdgeLLM:
    """The pair in float32."""
    from edge_export.convert import export_model

    folder = tmp_path_factory.mktemp("pair")
    for name, source in sources.items():
        export_model(source, folder / name, weights="fp32")
    return EdgeLLM.load(folder / "target", draft=folder / "draft", precision="f32")


@pytest.fixture(scope="module")
def prompts(shared_data) -> list[str]:
    lines = (shared_data / "evals" / "tinystories_prompts20.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:NUM_PROMPTS]]


@pytest.mark.slow
def test_answers_equal_transformers(pair, sources, prompts):
    """Plain, with a draft and with prompt lookup; stories are coherent, so a wrong token changes all that follows."""
    from edge_export.quiet import quiet

    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(sources["target"], dtype=torch.float32).eval()
        for prompt in prompts:
            prompt_ids = pair.tokenizer.encode(prompt)
            ids = torch.tensor([prompt_ids])
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
            made = model.generate(ids, max_new_tokens=150, **options)[0, len(prompt_ids) :].tolist()
            wanted = [token_id for token_id in made if token_id != 2]
            for drafting in ({"num_draft_tokens": 0}, {"num_draft_tokens": 4}, {"num_draft_tokens": 4, "lookup": True}):
                assert pair.generate(prompt, **OPTIONS, **drafting).token_ids == wanted


@pytest.mark.slow
def test_drafting_pays_in_target_forwards(pair, prompts):
    """The draft's reference acceptance is 0.838; less would mean that its cache went wrong, which equality hides."""
    made = [pair.generate(prompt, **OPTIONS, num_draft_tokens=4).metrics for prompt in prompts]
    assert sum(m.accepted_tokens for m in made) / sum(m.proposed_tokens for m in made) > 0.78


@pytest.mark.slow
def test_text_streams_as_it_is_returned(pair, prompts):
    for prompt in prompts:
        stream = pair.stream(prompt, **OPTIONS, stop=["."], num_draft_tokens=4)
        pieces = [chunk.text for chunk in stream]
        assert "".join(pieces) == stream.result.text
        assert "." not in stream.result.text
        assert stream.result.finish_reason in ("stop", "length")
