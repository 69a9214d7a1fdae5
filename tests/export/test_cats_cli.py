"""`edge-run export --mlp fused` and `--cats`: what is made, what is said about it, what is refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from edge_export.cats import MlpFormat
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import MANIFEST_NAME, Manifest, MlpFacts, load_manifest
from edge_runtime.models.loading import read_model
from edge_runtime.models.passes.fused_mlp import fused_mlps
from tests.export.helpers import encode, runtime_logits, torch_logits, write_shuffled
from tests.tiny_models import SENTENCES, make_hf_model

kernels = pytest.mark.kernels
INT8_ERROR = 0.15
"""rms(Δ) / σ: random weights in int8, and neurons that fall on the other side of a threshold for it."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cats") / "hf"
    return make_hf_model("llama", folder, hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_shuffled(tmp_path_factory.mktemp("cats") / "text.txt", 16)


@kernels
def test_fused_export_runs_and_says_so(edge_run, hf, tmp_path):
    code, out, err = edge_run(hf, "-o", tmp_path / "ir", "--mlp", "fused", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["mlp"] == {"kind": "fused", "activation_sparsity": None, "method": None}
    assert report["sparsity"] is None
    assert report["verification"]["error"] < INT8_ERROR
    assert load_manifest(tmp_path / "ir").mlp == MlpFacts(kind="fused")
    nodes = fused_mlps(read_model(tmp_path / "ir")[0])
    assert [node.input_value(2).get_node().get_data().tolist() for node in nodes] == [[-1.0]] * 2
    ids = encode(tmp_path / "ir", SENTENCES[0])
    difference = runtime_logits(tmp_path / "ir", ids) - (wanted := torch_logits(hf, ids))
    assert np.sqrt(np.mean(difference**2)) / wanted.std() < INT8_ERROR


@kernels
def test_cats_reports_realised_sparsity(edge_run, hf, text, tmp_path):
    code, out, err = edge_run(hf, "-o", tmp_path / "ir", "--cats", 0.5, "--calibration-text", text, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["mlp"] == {"kind": "fused", "activation_sparsity": 0.5, "method": "cats"}
    assert report["sparsity"]["realised"] == pytest.approx([0.5, 0.5], abs=0.05)
    assert report["verification"]["error"] < report["sparsity"]["effect"]["error"] < INT8_ERROR
    nodes = fused_mlps(read_model(tmp_path / "ir")[0])
    thresholds = [node.input_value(2).get_node().get_data() for node in nodes]
    assert [limits.shape for limits in thresholds] == [(1,)] * 2
    assert all((limits > 0).all() for limits in thresholds)


@kernels
def test_realised_sparsity_of_each_layer_is_on_stderr(edge_run, hf, text, tmp_path):
    """A model that is 90 % sparse on purpose is no failed export."""
    options = ("--cats", 0.9, "--cats-method", "chess", "--calibration-text", text)
    code, out, err = edge_run(hf, "-o", tmp_path / "ir", *options)
    assert code == 0
    assert load_manifest(tmp_path / "ir").mlp == MlpFacts(kind="fused", activation_sparsity=0.9, method="chess")
    thresholds = fused_mlps(read_model(tmp_path / "ir")[0])[0].input_value(2).get_node().get_data()
    assert thresholds.shape == (256,)
    assert out.count("\n") == 1
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["layer 0", "layer 1", "all layers", "try it"]
    assert "of the neurons skipped on held-out text" in lines[0]


@pytest.mark.parametrize(
    ("args", "code", "error", "hint"),
    [
        (("--mlp", "melted"), 2, "mlp is 'melted', expected stock or fused", ""),
        (("--cats", "1"), 2, "cats is 1, expected a fraction between 0 and 1", "--cats 0.5"),
        (("--cats", "-0.5"), 2, "cats is -0.5, expected a fraction", ""),
        (("--cats", "nan"), 2, "cats is nan, expected a fraction", ""),
        (("--cats", "0.5"), 2, "cats needs a calibration text", "--calibration-text FILE"),
        (("--cats", "0.5", "--cats-method", "dogs"), 2, "cats_method is 'dogs', expected cats or chess", ""),
        (("--mlp", "fused", "--weights", "fp16"), 2, "weights is fp16, but fused MLPs need bf16, int8 or int4", "int8"),
        (
            ("--mlp", "fused", "--weights", "int4", "--group-size", "64"),
            2,
            "group_size is 64, but fused",
            "--group-size 128",
        ),
    ],
)
def test_bad_option_is_an_error_and_a_hint(edge_run, hf, tmp_path, monkeypatch, args, code, error, hint):
    monkeypatch.chdir(tmp_path)
    got, out, err = edge_run(hf, *args)
    assert (got, out) == (code, "")
    first, *rest = err.splitlines()
    assert first.startswith(f"error: {error}")
    assert not hint or hint in rest[0]
    assert list(tmp_path.iterdir()) == []


@kernels
@pytest.mark.parametrize(
    ("content", "code", "error"),
    [("short", 2, "the calibration text has"), ("word " * 100, 2, "the calibration text has less than 640 tokens")],
)
def test_short_text_leaves_nothing(edge_run, hf, tmp_path, monkeypatch, content, code, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(content)
    got, _, err = edge_run(hf, "--cats", "0.5", "--calibration-text", "text")
    assert got == code
    assert err.startswith(f"error: {error}")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_manifest_of_a_stock_model_is_as_before(tmp_path):
    """A reader that does not know the entry `mlp` refuses it."""
    facts = {"architecture": "llama", "context_length": 8, "vocab_size": 8}
    (tmp_path / "openvino_model.xml").touch()
    for mlp in (None, MlpFacts(kind="fused"), MlpFacts(kind="fused", activation_sparsity=0.5, method="chess")):
        manifest = Manifest(**facts, mlp=mlp)
        manifest.save(tmp_path)
        assert ("mlp" in json.loads((tmp_path / MANIFEST_NAME).read_text())) == (mlp is not None)
        assert replace(load_manifest(tmp_path), files={}) == manifest


def test_cats_implies_fused():
    assert MlpFormat(cats=0.5).is_fused
    assert MlpFormat(mlp="fused").is_fused
    assert not MlpFormat().is_fused
    with pytest.raises(ConfigError):
        MlpFormat(cats=0.0)
