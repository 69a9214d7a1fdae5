"""A model with fused MLPs says what the plain export says, on every device, with a draft and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13

from edge_runtime import EdgeLLM
from edge_runtime.devices import core
from edge_runtime.errors import ConfigError
from edge_runtime.fused_mlp import fused_mlps, lower
from edge_runtime.paged_model import read_model
from ov_kernels.mlp_blob import pack
from tests.kernels.test_cats_mlp import compile_op, error_of, make_mlp, tokens
from tests.tiny_models import make_hf_model

pytestmark = pytest.mark.kernels

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TEXT = "the cat sat on the mat and the dog ran after the bird " * 200
PROMPT = [5, 9, 30, 7]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny Llama: as stock ops, with fused MLPs, and with fused MLPs of which half is skipped, int8 and int4."""
    from edge_export.convert import export_model

    folder = tmp_path_factory.mktemp("fused")
    source = make_hf_model("llama", folder / "hf", **SIZES)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    made = {}
    options: dict[str, dict[str, Any]] = {
        "stock": {},
        "fused": {"mlp": "fused"},
        "sparse": {"cats": 0.5, "calibration_text": folder / "text.txt"},
    }
    for weights in ("int8", "int4"):
        for name, own in options.items():
            made[f"{name} {weights}"] = folder / f"{name}-{weights}"
            calibrated = {"calibration_method": "awq"} if (weights, name) == ("int4", "sparse") else {}
            export_model(source, folder / f"{name}-{weights}", weights=weights, **own, **calibrated)
    return made


def logits(folder: Path, **options: Any) -> Any:
    llm = EdgeLLM.load(folder, precision="f32", **options)
    return llm.engine.target.model.forward(list(range(3, 15)), 12).copy()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_dense_fused_is_the_plain_export(models: dict[str, Path], weights: str) -> None:
    stock, fused = logits(models[f"stock {weights}"]), logits(models[f"fused {weights}"], mlp="fused")
    assert np.abs(stock - fused).max() <= 1e-4 * stock.std()


@pytest.mark.parametrize("name", ["fused int8", "fused int4", "sparse int8"])
def test_lowered_is_the_fused_form(models: dict[str, Path], name: str) -> None:
    fused, stock = (logits(models[name], mlp=form) for form in ("fused", "stock"))
    assert np.abs(stock - fused).max() <= 1e-4 * stock.std()


@pytest.mark.parametrize("form", ["i8", "u4", "bf16"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("threshold", [-1.0, 0.1])
def test_lowering_keeps_weights_activation_and_threshold(form: str, activation: str, threshold: float) -> None:
    from openvino.utils.node_factory import NodeFactory

    import ov_kernels

    blob, x = pack(make_mlp(form, 128, 256, activation=activation)), tokens(5, 128)
    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    parameter = opset13.parameter([-1, 128], np.float32)
    constants = [opset13.constant(blob), opset13.constant(np.array([threshold], np.float32))]
    op = factory.create("CatsMlp", [parameter.output(0), *(c.output(0) for c in constants)], {"exact": True})
    model = openvino.Model([op.output(0)], [parameter])
    lower(model)
    assert not fused_mlps(model)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    got = core().compile_model(model, "CPU", exact)([x])[0]
    assert error_of(got, compile_op(blob, 128, threshold, exact=True)(x).astype(np.float64)) <= 1e-4


@pytest.mark.parametrize("name", ["fused int8", "sparse int8", "sparse int4"])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 7])
def test_greedy_speculative_equals_greedy(models: dict[str, Path], name: str, num_draft_tokens: int) -> None:
    llm = EdgeLLM.load(models[name], draft=models["stock int4"], precision="f32", mlp="fused")
    plain, drafted = (
        llm.generate(PROMPT, max_new_tokens=40, num_draft_tokens=k, ignore_eos=True).token_ids
        for k in (0, num_draft_tokens)
    )
    assert plain == drafted


def test_exact_arithmetic_is_used_where_f32_was_asked_for(models: dict[str, Path]) -> None:
    """Rounded activations differ between one token and several, so a draft would change greedy text."""
    fused = models["fused int8"]
    both = [
        EdgeLLM.load(fused, mlp="fused", **options).engine.target.model.forward([3, 4, 5], 3).copy()
        for options in ({"precision": "f32"}, {"precision": "f32", "activation_group_size": 128})
    ]
    assert np.abs(both[0] - both[1]).max() > 0


def test_auto_times_both_forms_and_says_which_runs(models: dict[str, Path]) -> None:
    said = EdgeLLM.load(models["fused int8"]).engine.target.model.properties["mlp"]
    assert said.startswith(("fused: a layer's MLP takes ", "stock: a layer's MLP takes "))
    for form in ("fused", "stock"):
        assert EdgeLLM.load(models["fused int8"], mlp=form).engine.target.model.properties["mlp"] == form
    assert "mlp" not in EdgeLLM.load(models["stock int8"]).engine.target.model.properties


def test_a_wrong_form_is_one_line(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="mlp is 'dense', expected"):
        EdgeLLM.load(models["fused int8"], mlp="dense")


def test_the_npu_gets_standard_ops(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")
    llm = EdgeLLM.load(models["fused int8"], device="NPU", context_length=64)
    assert "no kernel" in llm.engine.target.model.properties["mlp"]
    answer = llm.generate(PROMPT, max_new_tokens=8, ignore_eos=True).token_ids
    plain = EdgeLLM.load(models["stock int8"], precision="f32", activation_group_size=0)
    assert answer == plain.generate(PROMPT, max_new_tokens=8, ignore_eos=True).token_ids


def test_the_model_cache_keeps_the_op(models: dict[str, Path], tmp_path: Path) -> None:
    """Constants come back from the cache at odd addresses."""
    first, again = (logits(models["sparse int8"], mlp="fused", cache_dir=tmp_path) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_read_model_holds_the_ops(models: dict[str, Path]) -> None:
    model, _ = read_model(models["fused int8"])
    assert len(fused_mlps(model)) == 2
