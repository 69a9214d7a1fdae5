"""Each family says in the runtime what it says in PyTorch, and its folder holds what the runtime needs."""

import json

import numpy as np
import openvino as ov
import pytest

from edge_export.convert import export_model
from edge_runtime.manifest import MODEL_NAME, load_manifest
from edge_runtime.models.passes.block_sparse_attention import OURS_FROM
from tests.export.helpers import encode, runtime_logits, torch_logits
from tests.tiny_models import CHAT_TEMPLATE, FAMILIES, SENTENCES

LOGITS_TOLERANCE = 1e-4
"""f32 on both sides; measured 1e-5 with logits up to 10."""
WINDOW = 24
PROMPT = " ".join(SENTENCES[:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_pytorch(tiny_hf, tiny_ir, monkeypatch, family):
    """A prompt longer than the sliding windows, fed in parts: rope, masks, norms, soft caps and cache all count.

    In OpenVINO's attention, which small models get, and in what large ones get.
    """
    ids = encode(tiny_ir(family), PROMPT)
    assert len(ids) > 2 * WINDOW
    wanted = torch_logits(tiny_hf(family), ids)
    for least in (OURS_FROM, 1):
        monkeypatch.setattr("edge_runtime.models.passes.block_sparse_attention.OURS_FROM", least)
        assert np.abs(runtime_logits(tiny_ir(family), ids) - wanted).max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_leaves_the_cache_precision_to_the_runtime(tiny_ir, family):
    """Optimum hides KV_CACHE_PRECISION=f16 in the file, which would override the plugin's choice."""
    model = ov.Core().read_model(tiny_ir(family) / MODEL_NAME)
    assert not model.has_rt_info("runtime_options")


@pytest.mark.parametrize("family", FAMILIES)
def test_manifest_says_what_the_model_is(tiny_ir, tiny_hf, family):
    manifest = load_manifest(tiny_ir(family))
    assert manifest.architecture == json.loads((tiny_hf(family) / "config.json").read_text())["model_type"]
    assert manifest.context_length == 512
    assert manifest.vocab_size == 384
    assert manifest.eos_token_ids == (0,)
    assert manifest.bos_token_id == 0
    assert manifest.weights == "fp32"
    assert manifest.num_parameters > 90_000
    assert {"edge-runtime", "openvino", "transformers"} <= set(manifest.versions)


def test_folder_holds_the_model_and_nothing_else(tiny_ir):
    names = {path.name for path in tiny_ir("llama").iterdir()}
    needed = {
        "openvino_model.xml",
        "openvino_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "edge_model.json",
    }
    assert needed <= names <= needed | {"chat_template.jinja", "special_tokens_map.json", "added_tokens.json"}


def test_chat_template_travels(tiny_ir):
    from edge_runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(tiny_ir("llama"))
    assert (tiny_ir("llama") / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert tokenizer.encode("<|user|>hi<|end|>")[0] == 1


@pytest.mark.parametrize("name", ["babyllama-target", "babyllama-draft"])
def test_trained_model_equals_pytorch(shared_data, tmp_path, name):
    source, output = shared_data / "models" / name, tmp_path / name
    report = export_model(source, output, weights="fp32")
    ids = encode(output, "Once upon a time, there was a little girl named Lily. She liked to play outside in the park.")
    assert np.abs(runtime_logits(output, ids) - torch_logits(source, ids)).max() < LOGITS_TOLERANCE
    assert report.verification.top1_agreement == 1
    assert report.manifest.num_parameters == 936_448
