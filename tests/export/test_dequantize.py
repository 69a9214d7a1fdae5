"""A quantised checkpoint becomes, bit for bit, the weights that its numbers stand for, and is exported as those."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_export import torch_source
from edge_export.convert import export_model
from edge_export.dequantize import dequantize, unpack
from edge_export.quantization import Quantization
from edge_export.sources import open_source
from edge_runtime.errors import EdgeError
from tests.export import quantized_models as made
from tests.export.helpers import runtime_logits, torch_logits
from tests.tiny_models import make_hf_model

TOKENS = list(range(3, 60))
WITHIN = 1e-4
"""Largest difference of logits up to 10 between PyTorch and the runtime in f32, as for plain checkpoints."""

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
CT = made.compressed_settings
BLOCK = (128, 128)

FORMATS = {
    "gptq": (made.gptq(), GPTQ, "GPTQ int4"),
    "gptq with act-order": (made.gptq(act_order=True), {**GPTQ, "desc_act": True}, "GPTQ int4"),
    "gptq v2": (made.gptq(is_v2=True), {**GPTQ, "checkpoint_format": "gptq_v2"}, "GPTQ int4"),
    "gptq of whole channels": (made.gptq(group_size=-1), {**GPTQ, "group_size": -1}, "GPTQ int4"),
    "gptq without g_idx": (made.gptq(has_g_idx=False), GPTQ, "GPTQ int4"),
    "gptq in 2 bits": (made.gptq(2), {**GPTQ, "bits": 2}, "GPTQ int2"),
    "gptq in 3 bits": (made.gptq(3), {**GPTQ, "bits": 3}, "GPTQ int3"),
    "gptq in 8 bits": (made.gptq(8), {**GPTQ, "bits": 8}, "GPTQ int8"),
    "auto-round": (
        made.gptq(),
        {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        "GPTQ int4",
    ),
    "awq": (made.awq(), AWQ, "AWQ int4"),
    "fp8 in blocks": (made.fp8(BLOCK), {**FP8, "weight_block_size": [*BLOCK]}, "fp8 in blocks of 128x128"),
    "fp8 with one scale": (made.fp8(name="weight_scale_inv"), FP8, "fp8"),
    "fbgemm": (made.fp8(by_row=True), {"quant_method": "fbgemm_fp8"}, "fp8"),
    "int4 packed": (made.compressed_packed(), CT("pack-quantized", "int", 4), "compressed-tensors int4"),
    "int4 packed, asymmetric": (
        made.compressed_packed(symmetric=False),
        CT("pack-quantized", "int", 4, symmetric=False),
        "compressed-tensors int4",
    ),
    "int8 packed by channel": (made.compressed_packed(8, -1), CT("pack-quantized", "int", 8), "compressed-tensors"),
    "int8": (made.compressed_int8(), CT("int-quantized", "int", 8), "compressed-tensors int8"),
    "int8, asymmetric": (made.compressed_int8(symmetric=False), CT("int-quantized", "int", 8), "compressed-tensors"),
    "int8, naive": (made.compressed_int8(), CT("naive-quantized", "int", 8), "compressed-tensors int8"),
    "float8 by channel": (made.fp8(by_row=True), CT("float-quantized", "float", 8), "compressed-tensors float8"),
    "float8 with one scale": (made.fp8(), CT("naive-quantized", "float", 8), "compressed-tensors float8"),
    "float8 in blocks": (
        made.fp8(BLOCK, name="weight_scale"),
        CT("float-quantized", "float", 8, block_structure=[*BLOCK]),
        "compressed-tensors float8",
    ),
    "dense": (made.compressed_dense(), CT("dense", "int", 4, group_size=32), "compressed-tensors int4"),
}


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A Llama whose sizes are no multiples of fp8's blocks."""
    sizes = {"hidden_size": 160, "intermediate_size": 320, "head_dim": 16}
    return make_hf_model("llama", tmp_path_factory.mktemp("plain") / "hf", **sizes)


def _assert_same_weights(folder: Path, reference: Path) -> None:
    got = torch_source.load(open_source(folder), "fp32").state_dict()
    expected = load_file(reference / "model.safetensors")
    assert set(expected) <= set(got)
    for name, value in expected.items():
        assert torch.equal(got[name], value.float()), name


@pytest.mark.parametrize("name", FORMATS)
def test_restored_weights_are_bit_for_bit_those_that_were_meant(plain, tmp_path, name):
    quantize, settings, words = FORMATS[name]
    reference = made.write_quantized(plain, tmp_path / "hf", quantize, settings)
    assert words in open_source(tmp_path / "hf").quantization.words
    _assert_same_weights(tmp_path / "hf", reference)


@pytest.mark.parametrize("name", ["gptq with act-order", "awq", "fp8 in blocks", "int4 packed", "int8"])
def test_export_says_what_the_restored_weights_say(plain, tmp_path, name):
    quantize, settings, words = FORMATS[name]
    reference = made.write_quantized(plain, tmp_path / "hf", quantize, settings)
    report = export_model(tmp_path / "hf", tmp_path / "ir", weights="fp32")
    assert any(words in note and "restored" in note for note in report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "ir" / "config.json").read_text())
    expected, got = torch_logits(reference, TOKENS), runtime_logits(tmp_path / "ir", TOKENS)
    assert np.abs(expected - got).max() < WITHIN


def test_layer_may_lie_in_several_files(plain, tmp_path):
    reference = made.write_quantized(plain, tmp_path / "hf", made.gptq(), GPTQ, num_files=3)
    _assert_same_weights(tmp_path / "hf", reference)


@pytest.mark.parametrize(
    ("name", "content", "quantize"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, made.gptq()),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, made.awq()),
    ],
)
def test_old_description_beside_config_is_read(plain, tmp_path, name, content, quantize):
    reference = made.write_quantized(plain, tmp_path / "hf", quantize, {})
    (tmp_path / "hf" / name).write_text(json.dumps(content))
    _assert_same_weights(tmp_path / "hf", reference)


def test_pickled_quantised_weights_are_restored(plain, tmp_path):
    reference = made.write_quantized(plain, tmp_path / "hf", made.gptq(), GPTQ)
    torch.save(load_file(tmp_path / "hf" / "model.safetensors"), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    _assert_same_weights(tmp_path / "hf", reference)


def test_sixteen_bit_checkpoint_stays_in_sixteen_bits(plain, tmp_path):
    made.write_quantized(plain, tmp_path / "hf", made.gptq(), GPTQ)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    source = open_source(tmp_path / "hf")
    assert {value.dtype for value in torch_source.load(source, "int8").parameters()} == {torch.float16}
    weights = sum(value.numel() for value in torch_source.load(source, "int8").parameters())
    assert 2 * weights <= source.weight_bytes <= 8 * weights


def test_second_rounding_is_told(plain, tmp_path):
    made.write_quantized(plain, tmp_path / "hf", made.gptq(), GPTQ)
    (note,) = open_source(tmp_path / "hf").notes("int8")
    assert note == "weights restored from GPTQ int4; as int8 they are rounded a second time"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda parts: parts.pop("model.layers.0.mlp.up_proj.scales"),
            r"`model\.layers\.0\.mlp\.up_proj` .* no scales",
        ),
        (lambda parts: parts.pop("model.layers.1.mlp.up_proj.qweight"), "lack 1 tensors, such as"),
        (lambda parts: parts["model.layers.0.mlp.up_proj.g_idx"].fill_(99), r"`model\.layers\.0\.mlp\.up_proj` cannot"),
    ],
)
def test_incomplete_layer_is_named(plain, tmp_path, spoil, message):
    made.write_quantized(plain, tmp_path / "hf", made.gptq(), GPTQ)
    parts = load_file(tmp_path / "hf" / "model.safetensors")
    spoil(parts)
    save_file(parts, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(EdgeError, match=message) as caught:
        torch_source.load(open_source(tmp_path / "hf"), "fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ int4 in the order of marlin kernels, which is not read"),
        ({**GPTQ, "bits": 5}, "expected 2, 3, 4 or 8 bits"),
        ({**AWQ, "version": "gemv"}, r"AWQ int4 \(gemv\), which is not read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, which is not read"),
        ({"quant_method": "hqq"}, "HQQ, which is not read"),
        ({"quant_method": "torchao"}, "torchao, which is not read"),
        ({"quant_method": "modelopt"}, "NVIDIA ModelOpt, which is not read"),
        ({"quant_method": "aqlm"}, "aqlm, which is not read"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"}, "auto-round, which is not read"),
        (CT("marlin-24", "int", 4), "marlin-24"),
        (CT("nvfp4-pack-quantized", "float", 4), "nvfp4"),
        (CT("pack-quantized", "int", 6), "expected int2, int4, int8 or float8"),
        ({**CT("dense", "float", 8), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({**CT("pack-quantized", "int", 4), "transform_config": {"R1": 1}}, "rotated weights"),
    ],
)
def test_other_quantisations_are_named_with_the_original_model(tiny_hf, settings, message):
    card = "---\nlicense: mit\nbase_model:\n- org/Original-1B\n---\n# card\n"
    folder = tiny_hf("llama")
    from edge_export.quantization import read_quantization

    with pytest.raises(EdgeError, match=message) as caught:
        read_quantization(folder, {"model_type": "llama", "quantization_config": settings}, {})
    assert caught.value.hint == "export the original, unquantised model"
    readme = folder / "README.md"
    readme.write_text(card)
    with pytest.raises(EdgeError) as caught:
        read_quantization(folder, {"model_type": "llama", "quantization_config": settings}, {})
    readme.unlink()
    assert caught.value.hint == "export the original, unquantised model org/Original-1B"


def test_quantised_weights_without_a_description_are_refused(plain, tmp_path):
    made.write_quantized(plain, tmp_path / "hf", made.fp8(), {})
    with pytest.raises(EdgeError, match=r"quantised weights such as model.* no quantization_config"):
        open_source(tmp_path / "hf")


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_numbers_of_any_width_are_unpacked(num_bits):
    numbers = np.random.default_rng(num_bits).integers(0, 1 << num_bits, (3, 64))
    words = np.stack([made.stream(row, num_bits) for row in numbers])
    assert unpack(torch.from_numpy(words), num_bits).tolist() == numbers.tolist()


def test_mxfp4_is_sixteen_values_times_a_power_of_two():
    rng = np.random.default_rng(0)
    numbers, exponents = rng.integers(0, 16, (2, 6, 3, 32)), rng.integers(100, 140, (2, 6, 3))
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = np.zeros((2, 96, 6), np.float32)
    for expert, output, group, i in np.ndindex(*numbers.shape):
        number = int(numbers[expert, output, group, i])
        sign = -1 if number >= 8 else 1
        value = sign * magnitudes[number % 8] * 2.0 ** (int(exponents[expert, output, group]) - 127)
        expected[expert, 32 * group + i, output] = value
    stored = {
        "experts.down_proj_blocks": torch.from_numpy((numbers[..., 0::2] + 16 * numbers[..., 1::2]).astype(np.uint8)),
        "experts.down_proj_scales": torch.from_numpy(exponents.astype(np.uint8)),
        "experts.down_proj_bias": torch.ones(2, 6),
    }
    mxfp4 = Quantization(method="mxfp4", words="mxfp4", num_bits=4, settings={})
    restored = dequantize(stored, mxfp4, torch.float32)
    assert set(restored) == {"experts.down_proj", "experts.down_proj_bias"}
    assert np.array_equal(restored["experts.down_proj"].numpy(), expected)
