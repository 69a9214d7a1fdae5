"""Quantised checkpoints to plain weights: W = (q - zero) * scale, in f32, each format from its published layout.

    GPTQ       qweight int32 (inputs * bits / 32, outputs), qzeros int32 (groups, outputs * bits / 32), scales (groups,
               outputs), g_idx (inputs): the group of each input. Format v1 stores zero points less one.
    AWQ        qweight int32 (inputs, outputs / 8), qzeros int32 (groups, outputs / 8), scales (groups, outputs); the
               eight values of a word are its columns 0, 2, 4, 6, 1, 3, 5, 7.
    fp8        weight e4m3 (outputs, inputs), weight_scale_inv or weight_scale: one, one per output, or per block.
    compressed-tensors
               weight_packed int32 (outputs, inputs * bits / 32), values and zero points raised by half their range; or
               weight int8 or fp8; weight_scale: one, (outputs, groups) or blocks; weight_zero_point, weight_g_idx.
               `dense` holds plain weights that the model rounds as it runs.
    mxfp4      NAME_blocks uint8 (experts, outputs, inputs / 32, 16), two e2m1 values a byte, the low one first;
               NAME_scales uint8: exponents raised by 127. NAME is (experts, inputs, outputs).

Packed words are a little-endian stream of bits. Rounding of activations is no part of the weights and is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edge_export.quantization import Quantization, weight_settings
from edge_runtime.errors import ExportError

if TYPE_CHECKING:
    import torch

Parts = dict[str, "torch.Tensor"]
"""The tensors of one layer by the last part of their names."""

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_E4M3 = 448.0


def dequantize(stored: dict[str, torch.Tensor], quantization: Quantization, dtype: torch.dtype) -> Parts:
    """Return the state dict that a plain checkpoint of the same model would have; `stored` is emptied on the way.

    Args:
        stored: Tensors by name, which may be read as they are asked for.
        quantization: How they are quantised.
        dtype: Type of the restored weights; all others stay as they are.

    Raises:
        ExportError: A layer lacks a part, or its parts do not fit together.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for name in stored:
        layers[name.rpartition(".")[0]].append(name.rpartition(".")[2])
    plain: Parts = {}
    for layer, names in layers.items():
        prefix = f"{layer}." if layer else ""
        parts = {name: stored.pop(prefix + name) for name in names}
        try:
            restored = _RESTORED[quantization.method](parts, quantization.settings)
        except (KeyError, RuntimeError, IndexError, ValueError) as error:
            told = f"has no {error.args[0]}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise ExportError(f"layer `{layer}` cannot be restored from {quantization.words}: {told}") from error
        plain |= {prefix + name: value.to(dtype) for name, value in restored.items()}
        plain |= {prefix + name: value for name, value in parts.items()}
    return plain


def unpack(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Return the numbers in each row of int32 words, a little-endian stream of `num_bits` each, as uint8."""
    import torch

    rows, num_words = words.shape
    lanes = torch.nn.functional.pad(words.int(), (0, -num_words % num_bits)).reshape(rows, -1, num_bits)
    numbers = torch.empty(*lanes.shape[:2], 32, dtype=torch.uint8)  # 32 numbers fill num_bits words
    for i in range(32):
        word, shift = divmod(i * num_bits, 32)
        value, rest = lanes[..., word] >> shift, 32 - shift
        if rest < num_bits:
            value = value & ((1 << rest) - 1) | lanes[..., word + 1] << rest
        numbers[..., i] = value & ((1 << num_bits) - 1)
    return numbers.reshape(rows, -1)[:, : num_words * 32 // num_bits]


def _gptq(parts: Parts, settings: dict[str, Any]) -> Parts:
    import torch

    if "qweight" not in parts:
        return {}
    scales, words = parts.pop("scales").float().T, parts.pop("qweight").T
    groups = parts.pop("g_idx", None)
    num_bits = settings["bits"] if groups is None else words.shape[1] * 32 // len(groups)
    values = unpack(words.contiguous(), num_bits)
    if groups is None:
        groups = torch.arange(values.shape[1]) * scales.shape[1] // values.shape[1]
    zeros = unpack(parts.pop("qzeros"), num_bits).T
    if (settings.get("checkpoint_format") or "gptq") == "gptq":
        zeros = (zeros + 1) & ((1 << num_bits) - 1)
    groups = groups.long()
    return {"weight": (values.float() - zeros.float()[:, groups]) * scales[:, groups]}


def _awq(parts: Parts, settings: dict[str, Any]) -> Parts:
    import torch

    if "qweight" not in parts:
        return {}
    order = torch.argsort(torch.tensor(_AWQ_COLUMNS))

    def columns(words: torch.Tensor) -> torch.Tensor:
        return unpack(words, 4).reshape(len(words), -1, 8)[..., order].reshape(len(words), -1).float()

    values, scales = columns(parts.pop("qweight")), parts.pop("scales").float()
    zeros = columns(parts.pop("qzeros")) if settings.get("zero_point", True) else torch.full_like(scales, 8.0)
    parts.pop("qzeros", None)
    group_size = len(values) // len(scales)
    values = (values.reshape(len(scales), group_size, -1) - zeros[:, None]) * scales[:, None]
    return {"weight": values.reshape(-1, scales.shape[1]).T.contiguous()}


def _fp8(parts: Parts, settings: dict[str, Any]) -> Parts:
    weight = parts.get("weight")
    if weight is None or weight.element_size() != 1:
        return {}
    scale = parts.pop("weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale")
    return {"weight": parts.pop("weight").float() * _spread(scale, weight.shape, settings.get("weight_block_size"))}


def _compressed(parts: Parts, settings: dict[str, Any]) -> Parts:
    if "weight_scale" not in parts:
        return {}
    weights = weight_settings(settings)
    scale, zero, groups = (parts.pop(f"weight_{name}", None) for name in ("scale", "zero_point", "g_idx"))
    if "weight_packed" in parts:
        values, zero = _unpack_compressed(parts.pop("weight_packed"), parts.pop("weight_shape").tolist(), zero)
    else:
        values = parts.pop("weight")
    if groups is not None and (groups < 0).any():
        groups = None  # -1 is what a quantiser that did not reorder leaves there
    block = _block(weights.get("block_structure"))
    scale = _spread(scale, values.shape, block, groups)
    zero = 0.0 if zero is None else _spread(zero, values.shape, block, groups)
    if values.dtype.itemsize > 1 and values.is_floating_point() and settings.get("quantization_status") != "compressed":
        values = _rounded(values.float() / scale + zero, weights)
    return {"weight": (values.float() - zero) * scale}


def _unpack_compressed(
    words: torch.Tensor, shape: list[int], zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the signed values of packed weights, and their zero points unpacked where those are packed too."""
    import torch

    num_bits = next(bits for bits in (2, 4, 8) if -(-shape[1] * bits // 32) == words.shape[1])
    half = 1 << (num_bits - 1)
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack(zero.T.contiguous(), num_bits)[:, : shape[0]].T.float() - half
    return unpack(words, num_bits)[:, : shape[1]].float() - half, zero


def _rounded(values: torch.Tensor, weights: dict[str, Any]) -> torch.Tensor:
    import torch

    if weights.get("type", "int") == "float":
        return values.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn).float()
    half = 1 << (weights.get("num_bits", 8) - 1)
    return values.round().clamp(-half, half - 1)


def _mxfp4(parts: Parts, _: dict[str, Any]) -> Parts:
    import torch

    numbers, restored = torch.tensor((*_E2M1, *(-value for value in _E2M1))), {}
    for name in [name.removesuffix("_blocks") for name in parts if name.endswith("_blocks")]:
        blocks, exponents = parts.pop(f"{name}_blocks"), parts.pop(f"{name}_scales")
        pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # (experts, outputs, groups, 32)
        values = torch.ldexp(numbers[pairs.int()], exponents.int()[..., None] - 127)
        restored[name] = values.flatten(-2).transpose(1, 2).contiguous()
    return restored


def _spread(
    scale: torch.Tensor, shape: Sequence[int], block: Sequence[int] | None = None, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """Return (outputs, inputs) or what broadcasts to it: a scale for each weight, in f32.

    Args:
        scale: One value, or values by (outputs, input groups) or by blocks.
        shape: Outputs and inputs.
        block: Outputs and inputs of a block; None where scales belong to outputs.
        groups: The group of each input; None for equal runs.
    """
    if scale.numel() == 1:
        return scale.float().reshape(1, 1)
    scale = scale.float().reshape(len(scale), -1)
    if block is not None:
        scale = scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
    if groups is not None:
        return scale[:, groups.long()]
    if len(scale) not in (1, shape[0]) or shape[1] % scale.shape[1]:
        raise ValueError(f"scales {tuple(scale.shape)} do not fit weights {tuple(shape)}")
    return scale.repeat_interleave(shape[1] // scale.shape[1], 1)


def _block(words: Sequence[int] | str | None) -> Sequence[int] | None:
    return [int(size) for size in words.split("x")] if isinstance(words, str) else words


_RESTORED: dict[str, Callable[[Parts, dict[str, Any]], Parts]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
}
