"""An export says which tokens end an answer, and a chat with the real model ends its turns at them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_export.convert import export_model
from edge_runtime import EdgeLLM
from edge_runtime.manifest import MANIFEST_NAME, load_manifest
from tests.tiny_models import make_hf_model

QUESTION = "What is the capital of France? Answer with one word."


def edit(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def name_end(folder: Path, eos: int | None, eos_token: str | None) -> None:
    """Let a model's configs and its tokenizer name these tokens as the end of a text."""
    for config in ("config.json", "generation_config.json"):
        edit(folder / config, eos_token_id=eos)
    edit(folder / "tokenizer_config.json", eos_token=eos_token)


def test_ends_of_tokenizer_and_template_join_those_of_the_configs(shared_data, tmp_path):
    """Phi-3's text ends at `<|endoftext|>`, its turns at `<|end|>`."""
    source = make_hf_model("llama", tmp_path / "source", vocab_size=32_064, hidden_size=32, num_hidden_layers=1)
    for path in (shared_data / "tokenizers" / "phi3").glob("*token*.json"):
        shutil.copy(path, source)
    name_end(source, 32000, "<|endoftext|>")
    report = export_model(source, tmp_path / "ir", weights="fp16")
    assert report.manifest.eos_token_ids == load_manifest(report.output).eos_token_ids == (32000, 32007)
    assert "answers also end at `<|end|>` (id 32007), named by the chat template" in report.notes


def test_model_without_any_end_is_exported_with_a_warning(edge_run, tmp_path):
    """transformers would fill in Llama's default, which is an ordinary word to most tokenizers."""
    source = make_hf_model("llama", tmp_path / "source")
    name_end(source, None, None)
    (source / "generation_config.json").unlink()
    (source / "chat_template.jinja").unlink()
    code, _, err = edge_run(source, "-o", tmp_path / "ir", "--weights", "fp32")
    assert code == 0
    assert err.startswith("warning: the model names no token that ends an answer: answers run to their length limit\n")
    assert load_manifest(tmp_path / "ir").eos_token_ids == ()


@pytest.mark.slow
def test_real_chat_ends_its_turn_where_the_configs_name_another_token(smollm2, tmp_path):
    """SmolLM2 with `<|endoftext|>` in its configs, as base models have it, ran on into "\\nsystem\\n\\nuser\\n"."""
    source = shutil.copytree(smollm2, tmp_path / "source")
    name_end(source, 0, "<|endoftext|>")
    report = export_model(source, tmp_path / "ir", weights="int8")
    assert report.manifest.eos_token_ids == (0, 2)
    assert report.notes == ("answers also end at `<|im_end|>` (id 2), named by the chat template",)
    for has_manifest in (True, False):
        if not has_manifest:
            (report.output / MANIFEST_NAME).unlink()  # as optimum-intel makes a folder
        answer = EdgeLLM.load(report.output).chat(QUESTION, max_new_tokens=60)
        assert (answer.finish_reason, len(answer.token_ids) < 60) == ("stop", True)
        assert "Paris" in answer.text
