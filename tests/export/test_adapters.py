"""A LoRA folder is exported as peft computes it, or refused in one line that names its base."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_export import torch_source
from edge_export.convert import export_model
from edge_export.quiet import quiet
from edge_export.sources import open_source
from edge_runtime.errors import EdgeError
from tests.export import quantized_models as made
from tests.export.helpers import runtime_logits
from tests.tiny_models import EOS_TOKEN, make_hf_model

TOKENS = list(range(3, 60))
WITHIN = 1e-4
"""Largest difference of logits up to 10 in f32: a merged matrix adds up in another order than base and adapter."""


def write_adapter(base: Path, folder: Path, *, num_new_tokens: int = 0, **settings) -> np.ndarray:
    """Write a random adapter of `base` as peft does, with a tokenizer where it has tokens of its own.

    Returns:
        (T, V) logits of base and adapter, as peft computes them unmerged.
    """
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    if num_new_tokens:
        model.resize_token_embeddings(model.config.vocab_size + num_new_tokens, mean_resizing=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"<new{i}>" for i in range(num_new_tokens)])
        tokenizer.save_pretrained(folder)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**options, "init_lora_weights": False, **settings})).eval()
    for name, value in adapted.named_parameters():
        if value.requires_grad and "lora_A" not in name:
            value.data += 0.05 * torch.randn_like(value)
    adapted.save_pretrained(folder, save_embedding_layers=True if num_new_tokens else "auto")
    with torch.no_grad():
        logits: np.ndarray = adapted(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def merged_logits(folder: Path, base: Path | None = None) -> np.ndarray:
    model = torch_source.load(open_source(folder, base), "fp32")
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=lambda settings: ", ".join(settings) or "plain",
)
def test_merged_model_says_what_peft_says(tiny_hf, tmp_path, settings):
    with quiet():
        expected = write_adapter(tiny_hf("llama"), tmp_path / "lora", **settings)
    assert np.abs(merged_logits(tmp_path / "lora") - expected).max() < WITHIN


def test_export_of_an_adapter_with_tokens_of_its_own(tiny_hf, tmp_path):
    expected = write_adapter(tiny_hf("llama"), tmp_path / "lora", num_new_tokens=3)
    report = export_model(tmp_path / "lora", tmp_path / "ir", weights="fp32", base=tiny_hf("llama"))
    assert "merged into its base" in report.notes[0]
    assert np.abs(runtime_logits(tmp_path / "ir", TOKENS) - expected).max() < WITHIN
    assert json.loads((tmp_path / "ir" / "config.json").read_text())["vocab_size"] == expected.shape[1] == 387
    assert "<new2>" in (tmp_path / "ir" / "tokenizer.json").read_text()


def test_pickled_adapter_is_merged(tiny_hf, tmp_path):
    expected = write_adapter(tiny_hf("llama"), tmp_path / "lora", num_new_tokens=2)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    assert np.abs(merged_logits(tmp_path / "lora") - expected).max() < WITHIN


def test_base_may_be_quantised(tiny_hf, tmp_path):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    plain = made.write_quantized(tiny_hf("llama"), tmp_path / "gptq", made.gptq(), settings)
    expected = write_adapter(plain, tmp_path / "lora")
    assert np.abs(merged_logits(tmp_path / "lora", tmp_path / "gptq") - expected).max() < WITHIN


def test_base_is_found_from_the_adapters_folder(tiny_hf, tmp_path):
    write_adapter(tiny_hf("llama"), tmp_path / "lora")
    shutil.copytree(tiny_hf("llama"), tmp_path / "base")
    _set(tmp_path / "lora", base_model_name_or_path="../base")
    source = open_source(tmp_path / "lora")
    assert (source.name, source.folder.resolve()) == ("lora", tmp_path / "base")


def _set(folder: Path, **entries: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def lora(tiny_hf, tmp_path):
    """A folder that looks like an adapter of the Llama."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tiny_hf("llama"))})
    )
    save_file({"base_model.model.x": torch.zeros(1)}, tmp_path / "lora" / "adapter_model.safetensors")
    return tmp_path / "lora"


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (
            lambda lora: _set(lora, base_model_name_or_path="org/Base-1B"),
            "is a LoRA adapter for `org/Base-1B`, which is no folder here",
            "--base org/Base-1B",
        ),
        (lambda lora: _set(lora, base_model_name_or_path=None), "which is no folder here", "--base FOLDER"),
        (lambda lora: _set(lora, peft_type="PREFIX_TUNING"), "is a PREFIX_TUNING adapter, expected LORA", "peft"),
        (lambda lora: _set(lora, task_type="SEQ_CLS"), "LoRA adapter for SEQ_CLS, expected CAUSAL_LM", ""),
        (lambda lora: _set(lora, alora_invocation_tokens=[1]), "cannot be merged into its base", ""),
        (lambda lora: (lora / "adapter_model.safetensors").unlink(), r"without adapter_model\.safetensors", "again"),
        (lambda lora: (lora / "adapter_model.safetensors").write_bytes(b""), "is empty", "again"),
        (lambda lora: (lora / "adapter_model.safetensors").write_bytes(b"version https://git-lfs"), "LFS", "lfs pull"),
        (lambda lora: (lora / "adapter_config.json").write_text("{"), "is not readable JSON", "again"),
        (lambda lora: save_file({}, lora / "model.safetensors"), "a whole model and a LoRA adapter", "of its own"),
        (lambda lora: _set(lora, base_model_name_or_path=str(lora)), "is no checkpoint, expected", ""),
    ],
)
def test_adapter_that_cannot_be_merged_is_named(lora, spoil, message, hint):
    spoil(lora)
    with pytest.raises(EdgeError, match=message) as caught:
        open_source(lora)
    assert "\n" not in str(caught.value)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("other", [{"hidden_size": 96}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_adapter_of_another_base_is_refused(tiny_hf, tmp_path, other):
    write_adapter(tiny_hf("llama"), tmp_path / "lora")
    base = make_hf_model("llama", tmp_path / "base", **other)
    with pytest.raises(EdgeError, match="does not fit its base: ") as caught:
        torch_source.load(open_source(tmp_path / "lora", base), "fp32")
    assert "\n" not in str(caught.value)
    assert str(tiny_hf("llama")) in (caught.value.hint or "")


def test_bias_that_the_base_has_no_place_for_is_refused(tiny_hf, tmp_path):
    with quiet():
        write_adapter(tiny_hf("llama"), tmp_path / "lora", lora_bias=True)
        with pytest.raises(EdgeError, match=r"cannot be merged: .*bias"):
            torch_source.load(open_source(tmp_path / "lora"), "fp32")


def test_base_for_a_whole_model_is_refused(tiny_hf):
    with pytest.raises(EdgeError, match="is no LoRA folder"):
        open_source(tiny_hf("llama"), tiny_hf("llama"))


def test_tokenizer_is_the_adapters_where_it_has_one(tiny_hf, lora):
    assert open_source(lora).of_tokenizer.folder == tiny_hf("llama")
    shutil.copy(tiny_hf("llama") / "tokenizer.json", lora / "tokenizer.json")
    assert open_source(lora).of_tokenizer.folder == lora
    assert EOS_TOKEN in (lora / "tokenizer.json").read_text()
