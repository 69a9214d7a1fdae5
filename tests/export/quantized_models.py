"""Quantised checkpoints written from the published descriptions of their formats, with the weights that they stand for.

Nothing here shares code with `edge_export.dequantize`: numbers are packed one by one into Python's long integers, and
each quantiser returns the values that its own numbers have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[Any]


class Layer(NamedTuple):
    """A quantised layer: its tensors by name, and the weight (outputs, inputs) that they stand for."""

    parts: dict[str, Any]
    weight: Array


def write_quantized(
    plain: Path, folder: Path, quantize: Callable[[Array], Layer], settings: dict[str, Any], *, num_files: int = 1
) -> Path:
    """Write `plain` with quantised projections into `folder`, and what they stand for into `folder`-plain.

    Returns:
        The folder of the plain copy.
    """
    reference = folder.with_name(folder.name + "-plain")
    for copy in (folder, reference):
        shutil.copytree(plain, copy)
        (copy / "model.safetensors").unlink()
    stored, restored = {}, {}
    for name, value in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            layer = quantize(value.float().numpy())
            for part, content in layer.parts.items():
                tensor = content if isinstance(content, torch.Tensor) else torch.from_numpy(np.array(content))
                stored[f"{name.removesuffix('.weight')}.{part}"] = tensor.contiguous()
            restored[name] = torch.from_numpy(layer.weight.astype(np.float32))
        else:
            stored[name] = restored[name] = value
    save_file(restored, reference / "model.safetensors", metadata={"format": "pt"})
    _save_in_files(stored, folder, num_files)
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return reference


def _save_in_files(tensors: dict[str, torch.Tensor], folder: Path, num_files: int) -> None:
    """Deal the tensors out like cards, so that a layer's parts lie in different files."""
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    placed = {name: names[i % num_files] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def stream(numbers: Array, num_bits: int) -> Array:
    """Pack a row of numbers one after another, the lowest bits first, into as many int32 words as they fill."""
    packed = sum(int(number) << (num_bits * i) for i, number in enumerate(numbers))
    num_words = -(-len(numbers) * num_bits // 32)
    return np.frombuffer(packed.to_bytes(4 * num_words, "little"), dtype="<i4").copy()


def grid(weight: Array, groups: Array, num_bits: int) -> tuple[Array, Array, Array]:
    """Round each row of a weight to whole numbers between 0 and 2^bits - 1, groups of inputs by their own scale.

    Returns:
        Numbers (outputs, inputs), zero points and f16 scales (outputs, groups).
    """
    top = (1 << num_bits) - 1
    numbers = np.zeros(weight.shape, np.int64)
    zeros, scales = [], []
    for group in range(groups.max() + 1):
        columns = groups == group
        low, high = weight[:, columns].min(1).clip(None, 0), weight[:, columns].max(1).clip(0)
        scale = ((high - low) / top).astype(np.float16)
        zero = np.rint(-low / scale.astype(np.float32)).clip(0, top)
        steps = np.rint(weight[:, columns] / scale[:, None].astype(np.float32))
        numbers[:, columns] = (steps + zero[:, None]).clip(0, top)
        zeros.append(zero)
        scales.append(scale)
    return numbers, np.stack(zeros, 1).astype(np.int64), np.stack(scales, 1)


def values(numbers: Array, zeros: Array, scales: Array, groups: Array) -> Array:
    """Return what the numbers stand for, in f32."""
    return (numbers - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]


def gptq(
    num_bits: int = 4, group_size: int = 32, *, act_order: bool = False, is_v2: bool = False, has_g_idx: bool = True
) -> Callable[[Array], Layer]:
    """Return a quantiser to GPTQ's layout: numbers of one output run down a column of words."""

    def quantize(weight: Array) -> Layer:
        groups = np.arange(weight.shape[1]) // (group_size if group_size > 0 else weight.shape[1])
        if act_order:
            groups = np.random.default_rng(0).permutation(groups)
        numbers, zeros, scales = grid(weight, groups, num_bits)
        stored = zeros if is_v2 else (zeros - 1) % (1 << num_bits)
        parts = {
            "qweight": np.stack([stream(row, num_bits) for row in numbers], 1),
            "qzeros": np.stack([stream(row, num_bits) for row in stored.T]),
            "scales": scales.T,
            "g_idx": groups.astype(np.int32),
        }
        if not has_g_idx:
            del parts["g_idx"]
        return Layer(parts, values(numbers, zeros, scales, groups))

    return quantize


def awq(group_size: int = 32) -> Callable[[Array], Layer]:
    """Return a quantiser to AWQ's layout for its gemm kernel: words along the outputs, in the kernel's order."""

    def words(rows: Array) -> Array:
        eights = rows.reshape(len(rows), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(rows), -1)
        return np.stack([stream(row, 4) for row in eights])

    def quantize(weight: Array) -> Layer:
        groups = np.arange(weight.shape[1]) // group_size
        numbers, zeros, scales = grid(weight, groups, 4)
        parts = {"qweight": words(numbers.T), "qzeros": words(zeros.T), "scales": scales.T}
        return Layer(parts, values(numbers, zeros, scales, groups))

    return quantize


def fp8(block: tuple[int, int] | None = None, *, by_row: bool = False, name: str = "") -> Callable[[Array], Layer]:
    """Return a quantiser to e4m3 with one scale for all, for each output or for each block, the last ones cut off."""

    def quantize(weight: Array) -> Layer:
        rows, columns = (1, weight.shape[1]) if by_row else block or weight.shape
        scales = np.zeros((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
        stored, restored = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), np.zeros_like(weight)
        for i, j in np.ndindex(*scales.shape):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = np.abs(weight[place]).max() / 448
            stored[place] = torch.from_numpy(weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            restored[place] = stored[place].float().numpy() * scales[i, j]
        scale_name = name or ("weight_scale_inv" if block else "weight_scale")
        return Layer({"weight": stored, scale_name: scales if block or by_row else scales[0, 0]}, restored)

    return quantize


def compressed_packed(num_bits: int = 4, group_size: int = 32, *, symmetric: bool = True) -> Callable[[Array], Layer]:
    """Return a quantiser to compressed-tensors' `pack-quantized`: signed numbers, raised by half their range."""
    half = 1 << (num_bits - 1)

    def quantize(weight: Array) -> Layer:
        size = group_size if group_size > 0 else weight.shape[1]
        groups = np.arange(weight.shape[1]) // size
        if symmetric:
            zeros = np.full((len(weight), groups.max() + 1), half)
            largest = np.abs(weight).reshape(len(weight), -1, size).max(2)
            scales = (largest / (half - 0.5)).astype(np.float16)
            steps = np.rint(weight / scales.astype(np.float32)[:, groups])
            numbers = (steps.clip(-half, half - 1) + half).astype(np.int64)
        else:
            numbers, zeros, scales = grid(weight, groups, num_bits)
        parts: dict[str, Any] = {
            "weight_packed": np.stack([stream(row, num_bits) for row in numbers]),
            "weight_scale": scales,
            "weight_shape": np.array(weight.shape, np.int64),
        }
        if not symmetric:
            parts["weight_zero_point"] = np.stack([stream(row, num_bits) for row in zeros.T], 1)
        return Layer(parts, values(numbers, zeros, scales, groups))

    return quantize


def compressed_int8(*, symmetric: bool = True) -> Callable[[Array], Layer]:
    """Return a quantiser to compressed-tensors' `int-quantized`: one int8 a weight, a scale for each output."""

    def quantize(weight: Array) -> Layer:
        groups = np.zeros(weight.shape[1], np.int64)
        numbers, zeros, scales = grid(weight, groups, 8)
        parts = {"weight": (numbers - 128).astype(np.int8), "weight_scale": scales}
        if symmetric:
            zeros = np.full_like(zeros, 128)
        else:
            parts["weight_zero_point"] = (zeros - 128).astype(np.int8)
        return Layer(parts, values(numbers, zeros, scales, groups))

    return quantize


def compressed_dense(num_bits: int = 4, group_size: int = 32) -> Callable[[Array], Layer]:
    """Return a quantiser to compressed-tensors' `dense`: plain weights, rounded each time the model runs."""
    half = 1 << (num_bits - 1)

    def quantize(weight: Array) -> Layer:
        groups = np.arange(weight.shape[1]) // group_size
        scales = (np.abs(weight).reshape(len(weight), -1, group_size).max(2) / half).astype(np.float32)
        steps = np.rint(weight / scales[:, groups]).clip(-half, half - 1)
        return Layer({"weight": weight, "weight_scale": scales}, steps * scales[:, groups])

    return quantize


def compressed_settings(form: str, kind: str, num_bits: int, **weights: Any) -> dict[str, Any]:
    """Return a `quantization_config` of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "frozen" if form == "dense" else "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": num_bits, "type": kind, **weights}}
        },
        "ignore": ["lm_head"],
    }
