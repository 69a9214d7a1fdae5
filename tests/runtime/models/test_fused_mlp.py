"""A model with fused MLPs says what the plain export says, on every device, with a draft and without."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13

import ov_kernels
from edge_runtime import EdgeLLM
from edge_runtime.config import LoadConfig
from edge_runtime.devices import core
from edge_runtime.errors import ConfigError, ExtensionError
from edge_runtime.manifest import MODEL_NAME, MlpFacts, load_manifest
from edge_runtime.models.base import advance
from edge_runtime.models.loading import read_model
from edge_runtime.models.passes import fused_mlp
from edge_runtime.models.passes.fused_mlp import fused_mlps, lower
from edge_runtime.models.plan import make_plan
from edge_runtime.models.weights import Weights
from ov_kernels.mlp_blob import LAYOUTS, GatedMlp, Matrix, layout_of, pack, unpack
from tests.kernels.test_cats_mlp import compile_op, error_of, make_mlp, tokens
from tests.runtime.npuw import KEYS_IN_F16
from tests.tiny_models import make_hf_model

pytestmark = pytest.mark.kernels

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
PROMPT = [5, 9, 30, 7]
NEURONS = 256
THRESHOLDS = [np.array([0.2], np.float32), np.random.default_rng(0).uniform(-0.1, 0.5, NEURONS).astype(np.float32)]
"""One for a layer, and one for each neuron; SiLU is below 0.28 on all negative gates, so these skip about half."""
ROUNDING = 1e-4
"""Bound of max |difference| / standard deviation of logits: f32 sums in another order."""
MS = r"\d+\.\d\d and \d+\.\d\d ms"
FIGURES = f": 1 and 4 tokens take 256 neurons of a layer {MS} fused, {MS} in OpenVINO's ops"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny Llama in int8, int4 and bf16: as stock ops, with fused MLPs, and with fused MLPs that skip neurons."""
    from edge_export.convert import export_model

    folder = tmp_path_factory.mktemp("fused")
    source = make_hf_model("llama", folder / "hf", **SIZES)
    made = {}
    for weights in ("int8", "int4", "bf16"):
        stock = folder / f"stock-{weights}"
        export_model(source, stock, weights=weights)
        made[f"stock {weights}"] = stock
        for name, thresholds in (("fused", None), ("sparse", THRESHOLDS)):
            made[f"{name} {weights}"] = fused_copy(stock, folder / f"{name}-{weights}", thresholds)
    return made


def fused_copy(stock: Path, folder: Path, thresholds: list[Any] | None) -> Path:
    """Copy a model folder, with its MLPs fused: what `edge-run export --mlp fused` writes, without another export."""
    from edge_export.cats.rewrite import fuse_mlps

    shutil.copytree(stock, folder)
    model = core().read_model(stock / MODEL_NAME)
    fuse_mlps(model, thresholds)
    openvino.save_model(model, folder / MODEL_NAME, compress_to_fp16=False)
    facts = MlpFacts(kind="fused", activation_sparsity=None if thresholds is None else 0.5)
    dataclasses.replace(load_manifest(folder), mlp=facts).save(folder)
    return folder


def logits(folder: Path, **options: Any) -> Any:
    llm = EdgeLLM.load(folder, precision="f32", **options)
    return forward(llm, list(range(3, 15)), 12)


def forward(llm: EdgeLLM, token_ids: list[int], num_rows: int) -> Any:
    """Return the logits after the last of some tokens, nothing before them."""
    return advance(llm.target, llm.target.sequence(), token_ids, num_rows).copy()


def mlp_of(llm: EdgeLLM) -> str | None:
    """Return what runs the target's fused MLPs, and why."""
    return llm.report()["target"].get("mlp")


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
def test_dense_fused_is_the_plain_export(models: dict[str, Path], weights: str) -> None:
    stock, fused = logits(models[f"stock {weights}"]), logits(models[f"fused {weights}"], mlp="fused")
    assert np.abs(stock - fused).max() <= ROUNDING * stock.std()
    texts = [
        EdgeLLM.load(models[f"{name} {weights}"], precision="f32", mlp="fused")
        .generate(PROMPT, max_new_tokens=40, ignore_eos=True)
        .token_ids
        for name in ("stock", "fused")
    ]
    assert texts[0] == texts[1]


def test_thresholds_skip_neurons(models: dict[str, Path]) -> None:
    """Else the tests of sparse models would say nothing."""
    dense, sparse = (logits(models[f"{name} int8"], mlp="fused") for name in ("fused", "sparse"))
    assert np.abs(dense - sparse).max() > 100 * ROUNDING * dense.std()


FORMS = [f"{name} {weights}" for name in ("fused", "sparse") for weights in ("int8", "int4", "bf16")]


@pytest.mark.parametrize("name", FORMS)
def test_lowered_is_the_fused_form(models: dict[str, Path], name: str) -> None:
    fused, stock = (logits(models[name], mlp=form) for form in ("fused", "stock"))
    assert np.abs(stock - fused).max() <= ROUNDING * stock.std()


def symmetric(mlp: GatedMlp) -> GatedMlp:
    """Return the MLP without zero points."""

    def centred(matrix: Matrix) -> Matrix:
        zero = None if matrix.zero is None else np.full_like(matrix.zero, 0 if matrix.format == "i8" else 8)
        return dataclasses.replace(matrix, zero=zero)

    return dataclasses.replace(mlp, **{name: centred(getattr(mlp, name)) for name in ("gate", "up", "down")})


def lowered(blob: Any, threshold: float) -> openvino.Model:
    """Return a model of one MLP, lowered."""
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    parameter = opset13.parameter([-1, 128], np.float32)
    constants = [opset13.constant(blob), opset13.constant(np.array([threshold], np.float32))]
    op = factory.create("CatsMlp", [parameter.output(0), *(c.output(0) for c in constants)], {"exact": True})
    model = openvino.Model([op.output(0)], [parameter])
    lower(model)
    assert not fused_mlps(model)
    return model


@pytest.mark.parametrize("form", ["i8", "u4", "bf16"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("threshold", [-1.0, 0.1])
@pytest.mark.parametrize("change", [lambda mlp: mlp, symmetric], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lowering_keeps_weights_activation_and_threshold(
    form: str, activation: str, threshold: float, change: Callable[[GatedMlp], GatedMlp], layout: str
) -> None:
    blob, x = pack(change(make_mlp(form, 128, NEURONS, activation=activation)), layout), tokens(5, 128)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    got = core().compile_model(lowered(blob, threshold), "CPU", exact)([x])[0]
    assert error_of(got, compile_op(blob, 128, threshold, exact=True)(x).astype(np.float64)) <= ROUNDING


@pytest.mark.parametrize(("form", "signed", "unsigned"), [("i8", "i8", "u8"), ("u4", "i4", "u4")])
def test_lowered_weights_without_zero_points_are_signed(form: str, signed: str, unsigned: str) -> None:
    """A symmetric export is what NPUs run; zero points that do nothing would undo it."""
    mlp = make_mlp(form, 128, NEURONS)
    for one, kind in ((mlp, unsigned), (symmetric(mlp), signed)):
        ops = lowered(pack(one), -1).get_ops()
        kinds = [op.get_output_element_type(0).to_string() for op in ops if op.get_type_name() == "Constant"]
        assert kinds.count(kind) >= 3
        assert any(op.get_type_name() == "Subtract" for op in ops) == (kind == unsigned)


@pytest.mark.parametrize("name", ["fused int8", "sparse int8", "sparse int4", "sparse bf16"])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 7])
def test_greedy_speculative_equals_greedy(models: dict[str, Path], name: str, num_draft_tokens: int) -> None:
    llm = EdgeLLM.load(models[name], draft=models["stock int4"], precision="f32", mlp="fused")
    plain, drafted = (
        llm.generate(PROMPT, max_new_tokens=40, num_draft_tokens=k, ignore_eos=True).token_ids
        for k in (0, num_draft_tokens)
    )
    assert plain == drafted


@pytest.mark.parametrize(
    ("options", "is_exact"),
    [
        ({}, False),
        ({"precision": "f32"}, True),
        ({"precision": "f32", "activation_group_size": 128}, False),
        ({"activation_group_size": 0}, True),
    ],
)
def test_the_op_rounds_activations_only_where_that_is_allowed(
    models: dict[str, Path], options: dict[str, Any], is_exact: bool
) -> None:
    """Rounded activations differ between one token and several, so a draft would change greedy text."""
    model, _ = read_model(models["fused int8"])
    fused_mlp.choose_mlps(model, make_plan("CPU", LoadConfig(mlp="fused", **options), Weights(num_bytes=1)))
    assert {node.get_attributes()["exact"] for node in fused_mlps(model)} == {is_exact}


def test_the_plugin_obeys_the_attribute(models: dict[str, Path]) -> None:
    rounded, exact = (
        forward(
            EdgeLLM.load(models["fused int8"], mlp="fused", precision="f32", activation_group_size=size), [3, 4, 5], 3
        )
        for size in (128, 0)
    )
    assert np.abs(rounded - exact).max() > 0


def test_auto_times_both_forms_and_says_which_runs(models: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edge_runtime")
    for name in ("fused int8", "sparse int4"):
        said = mlp_of(EdgeLLM.load(models[name]))
        assert said is not None
        assert re.fullmatch("(fused|stock)" + FIGURES, said)
        assert caplog.messages[-1] == f"fused MLPs run {said}"


@pytest.mark.parametrize("form", ["fused", "stock"])
def test_a_form_that_was_asked_for_is_what_runs(models: dict[str, Path], form: str) -> None:
    llm = EdgeLLM.load(models["sparse int8"], mlp=form)
    assert mlp_of(llm) == form
    ops = llm.target._compiled.get_runtime_model().get_ops()
    assert any(op.get_rt_info()["layerType"].astype(str) == "Reference" for op in ops) == (form == "fused")


def test_a_plain_model_has_no_fused_mlps(models: dict[str, Path]) -> None:
    assert mlp_of(EdgeLLM.load(models["stock int8"])) is None


@pytest.mark.parametrize(
    ("fused_ms", "stock_ms", "chosen"), [(1.0, 2.0, "fused"), (1.0, 0.85, "fused"), (1.0, 0.75, "stock")]
)
def test_stock_must_be_clearly_faster(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fused_ms: float, stock_ms: float, chosen: str
) -> None:
    """Noise would otherwise decide between near equals, and OpenVINO's ops take twice the memory."""
    monkeypatch.setattr(fused_mlp, "_trial", lambda *_: {"fused": fused_ms, "stock": stock_ms})
    said = mlp_of(EdgeLLM.load(models["fused int8"]))
    assert said is not None
    assert said.startswith(f"{chosen}: ")
    assert f"{fused_ms:.2f} and {fused_ms:.2f} ms fused, {stock_ms:.2f} and" in said


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_the_trial_skips_the_share_that_was_exported(share: float) -> None:
    """Random input meets thresholds of real activations: it would skip another share, none or all."""
    limits = fused_mlp._thresholds(NEURONS, share)
    assert limits.shape == (NEURONS,)
    assert abs(np.isinf(limits).mean() - share) <= 1 / NEURONS


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
def test_the_trial_is_bounded(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, weights: str
) -> None:
    """A layer of a large model would take longer to try than the model to load."""
    monkeypatch.setattr(fused_mlp, "TRIAL_BYTES", 1)
    with caplog.at_level(logging.INFO):
        EdgeLLM.load(models[f"sparse {weights}"])
    assert "1 and 4 tokens take 128 neurons of a layer" in caplog.messages[-1]


@pytest.mark.parametrize("form", ["i8", "u4", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trial_reads_weights_as_the_model_does(monkeypatch: pytest.MonkeyPatch, form: str, layout: str) -> None:
    """Records are read slower than tiles: a trial of the other layout would decide for the wrong op."""
    mlp = make_mlp(form, 128, 2 * NEURONS)
    x, limits = opset13.parameter([-1, 128], np.float32), opset13.constant(np.zeros(1, np.float32))
    node = ov_kernels.create(
        "CatsMlp", [x.output(0), opset13.constant(pack(mlp, layout)).output(0), limits.output(0)], {}
    )
    monkeypatch.setattr(fused_mlp, "TRIAL_BYTES", 1)
    sample, _ = fused_mlp._first_neurons(node)
    np.testing.assert_array_equal(sample.down.floats(), mlp.down.floats()[:, :128])
    (tried,) = fused_mlps(fused_mlp._fused_alone(node, sample))
    blob = tried.input_value(1).get_node().data
    assert layout_of(blob) == layout
    np.testing.assert_array_equal(unpack(blob).up.floats(), mlp.up.floats()[:128])


@pytest.mark.parametrize(("megabytes", "fills"), [([1] * 4, False), ([20] * 5, True), ([100, 20], True)])
def test_the_trial_drops_a_layer_from_the_caches_if_the_model_would(megabytes: list[int], fills: bool) -> None:
    """In a model larger than the caches each layer comes from memory, which is where skipped weights save time."""
    fill = fused_mlp._cache_filler([np.zeros(size << 20, np.uint8) for size in megabytes])
    assert (fill() is not None) == fills


def test_a_wrong_form_is_one_line(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="mlp is 'dense', expected"):
        EdgeLLM.load(models["fused int8"], mlp="dense")


def test_the_command_line_takes_and_reports_the_form(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_runtime.cli.app import run

    asked = ["generate", "-m", str(models["fused int8"]), "-n", "2", "--stats", "--mlp"]
    assert run([*asked, "fused", "Once"]) == 0
    assert re.search(r"target fused MLPs  fused\s", capsys.readouterr().err)
    assert run([*asked, "dense", "Once"]) == 2
    assert "error: --mlp is 'dense', expected one of auto, fused, stock\n" in capsys.readouterr().err


def test_devices_name_the_instructions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from edge_runtime.cli.app import run

    monkeypatch.setenv("EDGE_KERNELS_ISA", "ref")
    assert ov_kernels.instruction_set() == "ref"
    assert run(["devices"]) == 0
    assert "\nkernels: ref (" in capsys.readouterr().out
    monkeypatch.setattr(ov_kernels, "library_path", lambda: None)
    assert ov_kernels.instruction_set() == "none"
    assert run(["devices"]) == 0
    assert "\nkernels: none (the compiled library" in capsys.readouterr().out


def test_the_npu_gets_standard_ops(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")
    llm = EdgeLLM.load(models["sparse int8"], device="NPU", context_length=64, mlp="fused")
    assert mlp_of(llm) == "stock: NPU has no kernel for fused MLPs"
    assert ("WARNING", f"fused MLPs run {mlp_of(llm)}") in [
        (record.levelname, record.message) for record in caplog.records
    ]
    cpu = EdgeLLM.load(models["sparse int8"], precision="f32", mlp="fused")
    npu_logits, cpu_logits = (forward(one, PROMPT, 1) for one in (llm, cpu))
    assert np.abs(npu_logits - cpu_logits).max() <= KEYS_IN_F16
    assert len(llm.generate(PROMPT, max_new_tokens=8, ignore_eos=True).token_ids) == 8


@pytest.mark.parametrize("options", [{}, {"mlp": "stock"}, {"device": "NPU"}], ids=["auto", "stock", "npu"])
def test_without_the_library_the_model_is_one_line(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """OpenVINO reads no IR with an unknown op, so that not even the lowered form can be made of it."""
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")
    monkeypatch.delenv(ov_kernels.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(ov_kernels, "_installed_paths", lambda: iter(()))
    with pytest.raises(ExtensionError, match=r"compiled library is not installed.* OpenVINO's own ops") as caught:
        EdgeLLM.load(models["fused int8"], **options)
    assert "\n" not in str(caught.value)
    assert "pip install" in (caught.value.hint or "")
    assert mlp_of(EdgeLLM.load(models["stock int8"])) is None


def test_the_model_cache_keeps_the_op(models: dict[str, Path], tmp_path: Path) -> None:
    """Constants come back from the cache at odd addresses."""
    first, again = (logits(models["sparse int8"], mlp="fused", cache_dir=tmp_path) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_read_model_holds_the_ops(models: dict[str, Path]) -> None:
    model, _ = read_model(models["fused int8"])
    assert len(fused_mlps(model)) == 2
