"""The exported folder against the model that it came from: same prompts, logits side by side.

The folder is loaded as the runtime loads it, PagedAttention included, first in f32 and then at default precision, and
each prompt is fed in two parts, so that the second reads keys and values of the first from the cache. What is compared
is what runs.

Δ is the difference of the logits, σ the standard deviation of the reference logits. The error is rms(Δ) / σ: 0 for the
same function, √2 for an unrelated one. Unlike agreement of the most likely token it does not depend on near-ties,
which a model with random or few weights is full of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_runtime.config import LoadConfig
from edge_runtime.errors import ExportError
from edge_runtime.manifest import Manifest
from edge_runtime.models.base import CausalModel, advance
from edge_runtime.models.loading import load_model
from edge_runtime.models.passes.paged_attention import attention_ops, to_paged_attention
from edge_runtime.text.tokenizer import Tokenizer

PROMPTS = (
    "Once upon a time there was a little fox who lived at the edge of a quiet forest. Every morning the fox went to "
    "the river and asked the old owl a question, and every morning the owl answered with another question.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\n"
    "print([fibonacci(n) for n in range(10)])  # [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]\n",
    "Die Hauptstadt von Frankreich ist Paris. La capitale de l'Allemagne est Berlin. The capital of Italy is Rome, "
    "and that of Spain is Madrid. Japan's capital, Tokyo, has fourteen million inhabitants.",
    "Question: A shop sells pencils at 3 for 45 cents. How much do 8 pencils cost?\nAnswer: One pencil costs 45 / 3 = "
    "15 cents, so 8 pencils cost 8 * 15 = 120 cents, which is $1.20.",
)
MAX_TOKENS = 48
"""Most tokens of each prompt: enough for positions and cache to matter, few enough for large models."""

ERROR_BOUNDS = {
    "fp32": 1e-3,  # measured 1e-6; f32 rounding grows with depth
    "fp16": 2e-2,  # 11 bits of each weight: 5e-4, times depth
    "bf16": 0.1,  # 8 bits of each weight: 4e-3, times depth
    "int8": 0.7,  # a quality, not an equality: reported, and refused only where hardly half of the signal is left
    "int4": 0.7,
}

DEFAULT_ERROR_BOUNDS = {"fp32": 0.4, "fp16": 0.4, "bf16": 0.4, "int8": 0.8, "int4": 0.8}
"""The same at default settings: on some CPUs in bf16 (8 bits of each activation, times depth), with rounded activations
and u8 keys and values. Measured 0.006 to 0.02 where f32 gives 1e-6; above this, answers are not the source's."""

_WINDOWED = ("sliding_attention", "chunked_attention", "local")
"""What configs call a layer that attends to a window only."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How an exported model compares with its source.

    Attributes:
        error: rms(Δ) / σ.
        max_abs_error: Largest |Δ|, in logits.
        kl_divergence: Mean of KL(source ‖ export) over positions, in nats.
        top1_agreement: Share of positions at which both hold the same token most likely.
        num_positions: Positions compared.
    """

    error: float
    max_abs_error: float
    kl_divergence: float
    top1_agreement: float
    num_positions: int


def prompt_ids(tokenizer: Tokenizer, context_length: int | None) -> NDArray[np.int64]:
    """Return the fixed prompts as (B, T) token ids, all cut to one length."""
    rows = [tokenizer.encode(text) for text in PROMPTS]
    width = min(MAX_TOKENS, context_length or MAX_TOKENS, *(len(row) for row in rows))
    return np.array([row[:width] for row in rows], np.int64)


def verify_logits(
    folder: Path, manifest: Manifest, token_ids: NDArray[np.int64], reference: NDArray[np.float32]
) -> Verification:
    """Compare the model in `folder`, in f32, with the reference logits (B, T, V) of `token_ids` (B, T).

    Raises:
        ExportError: The runtime cannot run it, or the error is above the bound of its weight format.
    """
    result = compare(reference, _run(folder, manifest, token_ids, precision="f32"))
    _check_error(result, ERROR_BOUNDS[manifest.weights], manifest, "")
    return result


def verify_default(
    folder: Path, manifest: Manifest, token_ids: NDArray[np.int64], reference: NDArray[np.float32]
) -> Verification:
    """Compare it once more in the arithmetic that users get by default on this CPU.

    Raises:
        ExportError: The runtime cannot run it so, or the error is above the bound.
    """
    result = compare(reference, _run(folder, manifest, token_ids, precision="auto"))
    _check_error(result, DEFAULT_ERROR_BOUNDS[manifest.weights], manifest, " at default precision")
    return result


def _check_error(result: Verification, bound: float, manifest: Manifest, where: str) -> None:
    if not result.error <= bound:  # NaN is not
        raise ExportError(
            f"the exported model differs from its source{where}: error {result.error:.2g}, expected at most {bound:g}",
            "export with more precise weights" if manifest.weights != "fp32" else "please report the model",
        )


def compare(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> Verification:
    """Return the measures of two (..., V) arrays of logits."""
    rows = list(zip(*(array.reshape(-1, array.shape[-1]) for array in (reference, logits)), strict=True))
    differences = [other.astype(np.float64) - row for row, other in rows]
    return Verification(
        error=float(np.sqrt(np.mean([np.mean(row**2) for row in differences])) / np.std(reference, dtype=np.float64)),
        max_abs_error=float(max(np.abs(row).max() for row in differences)),
        kl_divergence=float(np.mean([_kl_divergence(row, other) for row, other in rows])),
        top1_agreement=float(np.mean([row.argmax() == other.argmax() for row, other in rows])),
        num_positions=len(rows),
    )


def check_windows(model: ov.Model, config: Any) -> None:
    """Raise ExportError unless the layers that attend to a window only do so in the graph that will run.

    OpenVINO's PagedAttention finds a window in the shape of the mask's subgraph; where it does not, the layer sees
    everything, which no short prompt would show.
    """
    expected = _num_windowed_layers(config)
    if expected == 0:
        return
    paged = model.clone()
    to_paged_attention(paged)
    found = sum(not _is_zero(op.input_value(10).get_node()) for op in attention_ops(paged))
    if found != expected:
        raise ExportError(
            f"sliding-window attention is recognised in {found} of {expected} layers of the graph",
            "install the export extra's own versions of its packages, then export the original Hugging Face folder",
        )


def _num_windowed_layers(config: Any) -> int:
    sizes = (getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size"))
    window = next((size for size in sizes if size), None)
    if window is None or window >= (getattr(config, "max_position_embeddings", None) or window + 1):
        return 0
    layers = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    return sum(layer in _WINDOWED for layer in layers) if layers else int(config.num_hidden_layers)


def _is_zero(node: ov.Node) -> bool:
    return node.get_type_name() == "Constant" and not np.any(node.get_data())


def _run(folder: Path, manifest: Manifest, token_ids: NDArray[np.int64], precision: str) -> NDArray[np.float32]:
    model = load_model(folder, manifest, LoadConfig(precision=precision, mlp="fused"))
    return np.stack([_logits(model, row.tolist()) for row in token_ids])


def _logits(model: CausalModel, token_ids: list[int]) -> NDArray[np.float32]:
    sequence, half = model.sequence(), len(token_ids) // 2
    parts = [part for part in (token_ids[:half], token_ids[half:]) if part]
    rows = [advance(model, sequence, part, len(part)).copy() for part in parts]
    sequence.close()
    return np.concatenate(rows)


def _kl_divergence(row: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    log_p, log_q = _log_softmax(row), _log_softmax(other)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def _log_softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = row.astype(np.float64) - row.max()
    result: NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted)))
    return result
