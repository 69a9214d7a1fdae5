"""ONNX in, the same folder out: attention found again, cache turned into states, logits those of the ONNX graph."""

import shutil

import numpy as np
import onnx
import pytest

from edge_export.convert import export_model
from edge_runtime.errors import ExportError
from edge_runtime.manifest import load_manifest
from tests.export.helpers import encode, runtime_logits, torch_logits, weight_types
from tests.export.onnx_models import make_onnx
from tests.export.test_families import LOGITS_TOLERANCE, PROMPT


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt2"])
def test_logits_equal_pytorch(tiny_onnx, tiny_hf, tmp_path, family, attention):
    """Llama, Qwen and Phi share keys between heads, GPT-2 does not; `sdpa` guards against NaN and splits the scale."""
    report = export_model(tiny_onnx(family, attention), tmp_path / "ir", weights="fp32")
    ids = encode(tmp_path / "ir", PROMPT)
    difference = runtime_logits(tmp_path / "ir", ids) - torch_logits(tiny_hf(family), ids)
    assert np.abs(difference).max() < LOGITS_TOLERANCE
    assert report.verification.error < 1e-5


def test_sdpa_graph_holds_what_hides_the_attention(tiny_onnx):
    """The reason for `_drop_nan_guards` and `_scale_queries_only`: were it gone, the test above would show nothing."""
    graph = onnx.load(tiny_onnx("llama", "sdpa") / "model.onnx").graph
    assert sum(node.op_type == "IsNaN" for node in graph.node) == 2


def test_manifest_is_that_of_the_checkpoint(tiny_onnx, tiny_ir, tmp_path):
    export_model(tiny_onnx("llama", "sdpa"), tmp_path / "ir", weights="fp32")
    onnx_manifest, torch_manifest = load_manifest(tmp_path / "ir"), load_manifest(tiny_ir("llama"))
    for fact in ("architecture", "context_length", "vocab_size", "eos_token_ids", "bos_token_id", "num_parameters"):
        assert getattr(onnx_manifest, fact) == getattr(torch_manifest, fact)


@pytest.mark.parametrize(
    ("weights", "types"), [("fp16", {"f16"}), ("bf16", {"bf16"}), ("int8", {"u8"}), ("int4", {"u4", "u8"})]
)
def test_weights_are_compressed_by_the_same_path(tiny_onnx, tmp_path, weights, types):
    export_model(tiny_onnx("llama", "sdpa") / "model.onnx", tmp_path / "ir", weights=weights, group_size=32)
    assert weight_types(tmp_path / "ir") == types


def test_config_may_lie_above_an_onnx_folder(tiny_onnx, tmp_path):
    """The layout of most ONNX repositories on the hub."""
    repository = tmp_path / "repository"
    shutil.copytree(tiny_onnx("llama", "sdpa"), repository)
    (repository / "onnx").mkdir()
    (repository / "model.onnx").rename(repository / "onnx" / "model.onnx")
    for number, source in enumerate((repository, repository / "onnx" / "model.onnx")):
        assert export_model(source, tmp_path / f"{number}", weights="fp32").manifest.architecture == "llama"


def test_sliding_window_lost_in_onnx_is_noticed(tiny_onnx, tmp_path):
    """OpenVINO does not see the window in this mask; without the check the model would attend to everything."""
    with pytest.raises(ExportError, match="sliding-window attention is recognised in 0 of 1 layers"):
        export_model(tiny_onnx("gemma3", "sdpa"), tmp_path / "ir", weights="fp32")


def test_soft_capped_attention_is_refused(tiny_onnx, tmp_path):
    with pytest.raises(ExportError, match="recognises attention in only 0 of the 2 layers"):
        export_model(tiny_onnx("gemma2", "eager"), tmp_path / "ir", weights="fp32")


def test_graph_without_cache_is_refused(tiny_hf, tmp_path):
    folder = make_onnx(tiny_hf("llama"), tmp_path / "onnx", with_cache=False)
    with pytest.raises(ExportError, match=r"has no inputs past_key_values\.N\.key") as caught:
        export_model(folder, tmp_path / "ir")
    assert "text-generation-with-past" in caught.value.hint


def test_missing_tokenizer_is_named(tiny_onnx, tmp_path):
    shutil.copytree(tiny_onnx("llama", "sdpa"), tmp_path / "onnx")
    (tmp_path / "onnx" / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"holds no tokenizer, expected one of tokenizer\.json"):
        export_model(tmp_path / "onnx", tmp_path / "ir")


def test_damaged_file_is_one_line(tiny_onnx, tmp_path):
    shutil.copytree(tiny_onnx("llama", "sdpa"), tmp_path / "onnx")
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"model\.onnx` cannot be read") as caught:
        export_model(tmp_path / "onnx", tmp_path / "ir")
    assert "\n" not in str(caught.value)
