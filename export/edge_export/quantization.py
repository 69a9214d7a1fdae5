"""Quantised weights of a checkpoint: its format is read, and restored at export or refused in one line.

Restored are the formats whose values are plain arithmetic (`dequantize`): GPTQ, AWQ, fp8, mxfp4, and the integer and
fp8 formats of compressed-tensors. All others are named, with what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_export.checkpoint_kinds import original
from edge_export.weight_files import AGAIN, StoredTensor
from edge_runtime.errors import ExportError
from edge_runtime.manifest import read_json

CONFIG_ENTRIES = ("quantization_config", "compression_config")
"""Where config.json describes the quantisation; the second is what old compressed-tensors wrote."""

_OLD_FILES = ("quantize_config.json", "quant_config.json")
"""What old AutoGPTQ and AutoAWQ wrote beside a config.json that knew nothing of it."""
_PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax", "_blocks")
_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense")
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
_TRANSPOSING = ("gpt2", "openai-gpt")
"""Their layers store matrices the other way round, and quantisers do not agree on which way they keep them."""
_NAMES = {"bitsandbytes": "bitsandbytes", "hqq": "HQQ", "torchao": "torchao", "modelopt": "NVIDIA ModelOpt"}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a checkpoint's weights are quantised, where they can be restored.

    Attributes:
        method: `gptq`, `awq`, `fp8`, `compressed-tensors` or `mxfp4`.
        words: Name of the method for people, such as `GPTQ int4`.
        num_bits: Bits of a quantised weight.
        settings: The checkpoint's own description.
    """

    method: str
    words: str
    num_bits: int
    settings: dict[str, Any]


def read_quantization(folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> Quantization | None:
    """Return how the weights are quantised; None for plain ones.

    Raises:
        ExportError: They are, in a way that is not read or not described.
    """
    settings = _settings(folder, config)
    if settings is None:
        _check_plain(folder, tensors)
        return None
    method = str(settings.get("quant_method", "")).lower()
    if method in ("auto-round", "intel/auto-round"):
        method = _AUTO_ROUND.get(str(settings.get("packing_format")), method)
    if method == "fbgemm_fp8":
        method = "fp8"
    known = _DESCRIBED.get(method)
    words, problem = known(settings) if known else (_NAMES.get(method, method or "unknown"), "is not read")
    if not problem and config.get("model_type") in _TRANSPOSING:
        problem = f"is not read for {config['model_type']}"
    if problem:
        raise ExportError(f"`{folder}` is quantised as {words}, which {problem}", original(folder, config))
    return Quantization(method=method, words=words, num_bits=_bits(settings, method), settings=settings)


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    for entry in CONFIG_ENTRIES:
        if isinstance(found := config.get(entry), dict) and found:
            return {"quant_method": "compressed-tensors", **found} if "config_groups" in found else found
    for name in _OLD_FILES:
        if old := read_json(folder / name):
            is_awq = "w_bit" in old
            return {
                "quant_method": "awq" if is_awq else "gptq",
                "bits": old.get("w_bit", 4),
                "group_size": old.get("q_group_size", 128),
                **old,
            }
    return None


def _check_plain(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    packed = next(
        (name for name, tensor in tensors.items() if name.endswith(_PACKED) or tensor.dtype.startswith("F8_")), None
    )
    if packed:
        raise ExportError(
            f"`{folder}` holds quantised weights such as {packed}, and config.json has no quantization_config", AGAIN
        )


# Each of these returns what people call the format, and what is wrong with this variety of it, or "".


def _describe_gptq(settings: dict[str, Any]) -> tuple[str, str]:
    form = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format") or "gptq"
    words = f"GPTQ int{settings.get('bits')}"
    if form not in ("gptq", "gptq_v2"):
        return f"{words} in the order of {form} kernels", "is not read"
    return words, "" if settings.get("bits") in (2, 3, 4, 8) else "is not read: expected 2, 3, 4 or 8 bits"


def _describe_awq(settings: dict[str, Any]) -> tuple[str, str]:
    version = str(settings.get("version") or "gemm").lower()
    words = f"AWQ int{settings.get('bits')}"
    if version not in ("gemm", "exllama", "ipex"):
        return f"{words} ({version})", "is not read: expected version gemm"
    return words, "" if settings.get("bits") == 4 else "is not read: expected 4 bits"


def _describe_fp8(settings: dict[str, Any]) -> tuple[str, str]:
    block = settings.get("weight_block_size")
    return f"fp8 in blocks of {block[0]}x{block[1]}" if block else "fp8", ""


def _describe_mxfp4(_: dict[str, Any]) -> tuple[str, str]:
    return "mxfp4", ""


def _describe_compressed(settings: dict[str, Any]) -> tuple[str, str]:
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    top = settings.get("format") or "dense"
    forms = {group.get("format") or top for group in groups} or {top}
    weights = [entry for group in groups if (entry := group.get("weights"))]
    kinds = sorted({f"{entry.get('type', 'int')}{entry.get('num_bits', 8)}" for entry in weights})
    words = f"compressed-tensors {', '.join(kinds)} ({', '.join(sorted(map(str, forms)))})"
    sparse = (settings.get("sparsity_config") or {}).get("format") or "dense"
    if not forms <= set(_COMPRESSED_FORMATS) or sparse != "dense":
        return words if sparse == "dense" else f"{words} with {sparse}", "is not read"
    if "dense" in forms and any(entry != weights[0] for entry in weights):
        return words, "is not read: expected one group"
    if settings.get("transform_config"):
        return f"{words} with rotated weights", "is not read"
    if any(entry.get("num_bits", 8) not in _COMPRESSED_BITS[entry.get("type", "int")] for entry in weights):
        return words, "is not read: expected int2, int4, int8 or float8"
    return words, ""


_COMPRESSED_BITS = {"int": (2, 4, 8), "float": (8,)}
_DESCRIBED = {
    "gptq": _describe_gptq,
    "awq": _describe_awq,
    "fp8": _describe_fp8,
    "mxfp4": _describe_mxfp4,
    "compressed-tensors": _describe_compressed,
}


def weight_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what compressed-tensors says about the weights of its first group; {} where it says nothing."""
    groups = (settings.get("config_groups") or {}).values()
    return next((entry for group in groups if (entry := group.get("weights"))), {})


def _bits(settings: dict[str, Any], method: str) -> int:
    if method == "compressed-tensors":
        return 16 if settings.get("format") == "dense" else int(weight_settings(settings).get("num_bits", 8))
    return int(settings.get("bits") or {"mxfp4": 4}.get(method, 8))


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that describes the restored weights."""
    return {name: value for name, value in config.items() if name not in CONFIG_ENTRIES}
