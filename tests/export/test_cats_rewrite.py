"""A graph with fused MLPs says what it said before, and what PyTorch says with the same neurons dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13

import ov_kernels
from edge_export.cats import CATS_METHODS, MlpFormat
from edge_export.cats.calibrate import find_thresholds
from edge_export.cats.rewrite import fuse_mlps
from edge_export.compress import CALIBRATION_METHODS, WeightFormat, calibration_windows, compress
from edge_export.convert import export_model
from edge_export.quiet import quiet
from edge_runtime.devices import core
from edge_runtime.errors import ExportError
from edge_runtime.manifest import MODEL_NAME
from edge_runtime.models.passes.fused_mlp import OP_TYPE, fused_mlps, lower
from ov_kernels.mlp_blob import layout_of
from tests.export.helpers import encode
from tests.tiny_models import SENTENCES, make_hf_model

pytestmark = pytest.mark.kernels

ROUNDING = 1e-4
"""Bound on max |Δ| / max |logit|: f32 sums in another order, and the stock graph's weights in f16. Measured 2e-5."""
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
FAMILY_SIZES = {"gemma2": {"head_dim": 32}}
TEXT = " ".join(SENTENCES)
CASES = [
    ("llama", {"weights": "int8"}),
    ("llama", {"weights": "int8", "symmetric": True}),
    ("llama", {"weights": "int4"}),
    ("llama", {"weights": "int4", "symmetric": True}),
    ("llama", {"weights": "int4", "group_size": -1}),  # what NPUs want; the op's groups then have equal scales
    ("llama", {"weights": "bf16"}),
    ("phi3", {"weights": "bf16"}),
    ("gemma2", {"weights": "int8"}),
    ("gemma2", {"weights": "int4"}),
    ("phi3", {"weights": "int8"}),
    ("phi3", {"weights": "int4"}),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function from a family to its Hugging Face folder and fp32 export, wide enough for groups of 128."""
    made = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = make_hf_model(family, folder / "hf", **SIZES, **FAMILY_SIZES.get(family, {})), folder / "ir"
            export_model(*made[family], weights="fp32")
        return made[family]

    return get


def compressed(folder: Path, **options: Any) -> ov.Model:
    """Return the graph of an fp32 export with its weights in another format."""
    with quiet():
        return compress(read(folder), WeightFormat(**options))


def read(folder: Path) -> ov.Model:
    ov_kernels.add_to(core(), required=True)
    return core().read_model(folder / MODEL_NAME)


def logits_of(model: ov.Model, token_ids: list[int]) -> NDArray[np.float32]:
    """Return (T, V) logits in f32, the op computing in f32 too."""
    for node in fused_mlps(model):
        node.set_attribute("exact", True)
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    compiled = core().compile_model(model, "CPU", properties)
    width, names = len(token_ids), {port.get_any_name() for port in compiled.inputs}
    inputs = {
        "input_ids": np.array([token_ids]),
        "attention_mask": np.ones((1, width), np.int64),
        "position_ids": np.arange(width)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    logits: NDArray[np.float32] = compiled({name: inputs[name] for name in names})["logits"][0].copy()
    return logits


def dequantised(folder: Path, graph: ov.Model) -> Any:
    """Return the Torch model of `folder` with the weights that a compressed graph holds."""
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    constants = {n.get_friendly_name(): n.get_data() for n in graph.get_ops() if n.get_type_name() == "Constant"}
    for name, parameter in model.named_parameters():
        if (values := constants.get(f"self.{name}")) is not None and f"self.{name}/scale" in constants:
            shifted = values.astype(np.float32) - constants.get(f"self.{name}/zero_point", np.uint8(0))
            parameter.data = torch.from_numpy(constants[f"self.{name}/scale"].astype(np.float32) * shifted)
    return model


def masked_mlp(mlp: Any, limits: NDArray[np.float32]) -> Any:
    """Return the forward of an MLP in which neurons are dead, written out."""
    import torch

    def forward(x: Any) -> Any:
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        a = getattr(mlp, "act_fn", None) or mlp.activation_fn
        a = a(gate)
        return mlp.down_proj(torch.where(a.abs() > torch.from_numpy(limits), a, 0.0) * up)

    return forward


def error_of(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("family", "options"), CASES)
def test_dense_fused_graph_equals_the_stock_one(exported, family, options):
    folder = exported(family)[1]
    ids, model = encode(folder, TEXT)[:48], compressed(folder, **options)
    wanted = logits_of(model.clone(), ids)
    assert fuse_mlps(model) == 2
    assert error_of(logits_of(model, ids), wanted) < ROUNDING
    assert {layout_of(node.input_value(1).get_node().data) for node in fused_mlps(model)} == {"tiles"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_sparse_graph_equals_pytorch_with_the_same_neurons_dead(exported, family):
    source, folder = exported(family)
    ids, graph = encode(folder, TEXT)[:48], compressed(folder, weights="int8")
    reference = dequantised(source, graph)
    dense = torch_logits(reference, ids)
    assert error_of(dense, logits_of(graph.clone(), ids)) < ROUNDING
    forwards = [layer.mlp.forward for layer in reference.model.layers]
    for method in CATS_METHODS:
        sparse = graph.clone()
        limits = find_thresholds(reference, [ids], MlpFormat(cats=0.5, cats_method=method))
        fuse_mlps(sparse, limits)
        assert {layout_of(node.input_value(1).get_node().data) for node in fused_mlps(sparse)} == {"records"}
        for layer, threshold in zip(reference.model.layers, limits, strict=True):
            layer.mlp.forward = masked_mlp(layer.mlp, threshold)
        wanted = torch_logits(reference, ids)
        assert error_of(wanted, dense) > 100 * ROUNDING
        assert error_of(logits_of(sparse, ids), wanted) < ROUNDING
        for layer, forward in zip(reference.model.layers, forwards, strict=True):
            layer.mlp.forward = forward


def torch_logits(model: Any, token_ids: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([token_ids]), use_cache=False).logits[0].numpy()
    return logits


@pytest.mark.parametrize("options", [{"weights": "int4", "symmetric": True}, {"weights": "bf16"}])
def test_fused_graph_survives_its_file_and_lowering(exported, tmp_path, options):
    folder = exported("llama")[1]
    ids, model = encode(folder, TEXT)[:32], compressed(folder, **options)
    wanted = logits_of(model.clone(), ids)
    fuse_mlps(model)
    ov.save_model(model, tmp_path / MODEL_NAME, compress_to_fp16=False)
    again = read(tmp_path)
    assert [node.get_friendly_name() for node in fused_mlps(again)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert error_of(logits_of(again, ids), wanted) < ROUNDING
    lower(again)
    assert not fused_mlps(again)
    assert error_of(logits_of(again, ids), wanted) < ROUNDING


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_int4_weights_fitted_to_a_text_are_fused_too(exported, method):
    """awq scales the channels of up and down."""
    folder = exported("llama")[1]
    ids = encode(folder, TEXT)
    options = {"weights": "int4", "calibration_method": method}
    with quiet():
        model = compress(read(folder), WeightFormat(**options), calibration_windows(ids, 32)[:4])
    wanted = logits_of(model.clone(), ids[:32])
    assert fuse_mlps(model) == 2
    assert error_of(logits_of(model, ids[:32]), wanted) < ROUNDING


def test_stock_ops_are_gone(exported):
    model = compressed(exported("llama")[1], weights="int8")
    fuse_mlps(model)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count(OP_TYPE) == 2
    assert "Swish" not in kinds
    assert kinds.count("MatMul") == 2 * 4 + 1 + 1  # attention's four in two layers, the logits, rotary angles


def test_sigmoid_times_x_is_silu(exported):
    """What some frontends leave of it."""
    folder = exported("llama")[1]
    ids, model = encode(folder, TEXT)[:32], compressed(folder, weights="int8")
    wanted = logits_of(model.clone(), ids)
    for node in of_type(model, "Swish"):
        x = node.input_value(0)
        node.output(0).replace(opset13.multiply(opset13.sigmoid(x), x).output(0))
    fuse_mlps(model)
    assert error_of(logits_of(model, ids), wanted) < ROUNDING


def of_type(model: ov.Model, kind: str) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def add_bias(model: ov.Model) -> None:
    for node in of_type(model, "MatMul"):
        if "up_proj" in node.get_friendly_name():
            users = node.output(0).get_target_inputs()
            biased = opset13.add(node, opset13.constant(np.ones(256, np.float32)))
            for user in users:
                user.replace_source_output(biased.output(0))


def make_relu(model: ov.Model) -> None:
    for node in of_type(model, "Swish"):
        node.output(0).replace(opset13.relu(node.input_value(0)).output(0))


@pytest.mark.parametrize(
    ("options", "spoil", "says"),
    [
        ({"weights": "int8"}, add_bias, r"layer model\.layers\.0\.mlp\.down_proj cannot .* projection has a bias"),
        ({"weights": "int8"}, make_relu, "a gated MLP of SiLU or GELU was found in 0 of 2 layers"),
        ({"weights": "int4", "group_size": 64}, None, "quantisation group is 64 weights in a row of 128"),
        ({"weights": "fp16"}, None, "its weights are stored in f16, expected bf16, int8 or int4"),
        ({"weights": "fp32"}, None, "its weights are stored in f32, expected bf16, int8 or int4"),
    ],
)
def test_mlp_that_does_not_fit_is_named_with_the_reason(exported, options, spoil, says):
    model = compressed(exported("llama")[1], **options)
    if spoil:
        spoil(model)
    with pytest.raises(ExportError, match=says) as caught:
        fuse_mlps(model)
    assert "without --mlp fused" in caught.value.hint


def test_sizes_that_four_bits_cannot_have_are_refused(tiny_ir):
    model = compressed(tiny_ir("llama"), weights="int4", group_size=-1)
    with pytest.raises(
        ExportError, match="quantisation group is 64 weights in a row of 64, expected a multiple of 128"
    ):
        fuse_mlps(model)


def test_thresholds_must_fit_the_model(exported):
    model = compressed(exported("llama")[1], weights="int8")
    with pytest.raises(ExportError, match="thresholds for 1 MLPs, but the graph has 2"):
        fuse_mlps(model, [np.zeros(1, np.float32)])
    with pytest.raises(ExportError, match=r"down_proj has 256 neurons, but thresholds of shape \(3,\)"):
        fuse_mlps(model, [np.zeros(3, np.float32)] * 2)
