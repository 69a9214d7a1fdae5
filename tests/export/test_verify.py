"""Verification finds what it is there to find."""

import dataclasses
import math
import shutil

import numpy as np
import openvino as ov
import pytest
from openvino import opset13

from edge_export import verify
from edge_runtime.config import LoadConfig
from edge_runtime.errors import ExportError
from edge_runtime.manifest import MODEL_NAME, load_manifest
from edge_runtime.models.loading import load_model
from edge_runtime.text.tokenizer import Tokenizer
from tests.export.helpers import torch_logits


def test_measures_of_two_known_distributions():
    """Two tokens: p = (1/2, 1/2) against q = (3/4, 1/4)."""
    reference, logits = np.zeros((1, 2), np.float32), np.log(np.array([[3.0, 1.0]], np.float32))
    reference[0, 0] = 1e-6  # a spread to divide by, and a first choice
    result = verify.compare(reference, logits)
    assert result.kl_divergence == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-5)
    assert result.max_abs_error == pytest.approx(math.log(3), abs=1e-5)
    assert result.top1_agreement == 1
    assert result.num_positions == 1


def test_error_is_zero_for_equal_and_root_two_for_unrelated_logits():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 50, 1000)).astype(np.float32)
    assert verify.compare(one, one).error == 0
    assert verify.compare(one, one).kl_divergence == 0
    assert verify.compare(one, other).error == pytest.approx(math.sqrt(2), rel=0.02)


@pytest.fixture
def reference(tiny_hf, tiny_ir):
    ids = verify.prompt_ids(Tokenizer(tiny_ir("llama")), 512)
    return ids, np.stack([torch_logits(tiny_hf("llama"), row.tolist()) for row in ids])


def test_prompts_have_one_length(reference):
    assert reference[0].shape == (4, verify.MAX_TOKENS)


@pytest.mark.parametrize(
    ("factor", "weights", "is_caught"),
    [
        (1.0, "fp32", False),
        (1.01, "fp32", True),
        (1.01, "int8", False),
        (0.0, "int4", True),
        (math.nan, "int4", True),
    ],
)
def test_changed_weight_is_caught(tiny_ir, tmp_path, reference, factor, weights, is_caught):
    """One matrix scaled by 1 % is an error in fp32 and within the rounding of int8; garbage is an error in both."""
    shutil.copytree(tiny_ir("llama"), tmp_path / "ir")
    _scale_down_projection(tmp_path / "ir", factor)
    manifest = dataclasses.replace(load_manifest(tmp_path / "ir"), weights=weights)
    if is_caught:
        with pytest.raises(ExportError, match="differs from its source: error"):
            verify.verify_logits(tmp_path / "ir", manifest, *reference)
    else:
        verify.verify_logits(tmp_path / "ir", manifest, *reference)


def test_verification_also_runs_in_the_arithmetic_that_users_get(tiny_ir, reference, monkeypatch):
    """On a CPU with AMX every check passed in f32, and the first `generate` ended the process."""
    ids, logits = reference
    manifest, made = load_manifest(tiny_ir("llama")), []
    monkeypatch.setattr(verify, "load_model", lambda *args: made.append(args[-1]) or load_model(*args))
    result = verify.verify_default(tiny_ir("llama"), manifest, ids, logits)
    assert [config.precision for config in made] == [LoadConfig().precision]
    assert verify.ERROR_BOUNDS["fp32"] < result.error < verify.DEFAULT_ERROR_BOUNDS["fp32"], "u8 keys and values"
    with pytest.raises(ExportError, match="differs from its source at default precision: error"):
        verify.verify_default(tiny_ir("llama"), manifest, ids, logits[::-1])


def _scale_down_projection(folder, factor):
    model = ov.Core().read_model(folder / MODEL_NAME)
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and ("down_proj" in node.get_friendly_name() or factor != factor):
            scaled = opset13.multiply(node.input_value(0), opset13.constant(np.float32(factor)))
            node.input(0).replace_source_output(scaled.output(0))
        elif node.get_type_name() == "MatMul" and factor == 0 and "o_proj" in node.get_friendly_name():
            zero = opset13.multiply(node.input_value(0), opset13.constant(np.float32(0)))
            node.input(0).replace_source_output(zero.output(0))
    ov.save_model(model, folder / "changed.xml", compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        (folder / "changed.xml").with_suffix(suffix).replace((folder / MODEL_NAME).with_suffix(suffix))
