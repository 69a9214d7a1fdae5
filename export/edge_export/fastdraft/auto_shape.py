"""A draft's size from time: as large as fits into a share of what the target takes for a token, on this machine.

The time of a draft's token is a fixed part, a part for each layer and a part for each byte of weights:

    t(L, bytes) = t0 + L t_layer + bytes t_byte

Three drafts with random weights, exported and timed as real ones are, give the three numbers. Of the depths whose
widest shape is not thinner than deep shapes should be, the deepest is taken.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_export.fastdraft.shape import DEPTH_WIDTH, MAX_LAYERS, WIDTH_STEP, count_parameters, draft_config
from edge_export.fastdraft.target import Target
from edge_export.quiet import quiet
from edge_runtime.manifest import weight_bytes
from edge_runtime.models.base import advance

PROBES = ((64, 1), (64, 6), (512, 1))
"""Width and depth of the drafts that are timed."""
CONTEXT, REPEATS = 64, 40
"""Tokens held while timing, and tokens timed."""
MAX_SHARE = 1 / 8
"""Largest draft, as a fraction of the target's parameters: more costs more to read than its acceptance brings."""


@dataclass(frozen=True, kw_only=True)
class ChosenShape:
    """What was chosen and why.

    Attributes:
        num_parameters: Number of parameters of the draft.
        num_layers: Number of layers of the draft.
        target_ms: Measured time of a token of the target.
        draft_ms: Predicted time of a token of the draft.
    """

    num_parameters: int
    num_layers: int
    target_ms: float
    draft_ms: float


def auto_shape(target: Target, latency_share: float, num_layers: int | None, **fixed: Any) -> ChosenShape:
    """Return the largest shape within a latency budget; the smallest one where none is.

    Args:
        target: Whose token is the measure, and whose tokenizer the timed drafts get.
        latency_share: The budget, as a share of the target's time for a token.
        num_layers: Depth; None chooses.
        **fixed: vocab_size, context_length and special_tokens of `draft_config`.
    """
    vocab_size = fixed["vocab_size"]
    target_ms = token_ms(target.folder)
    costs = _costs(target, fixed)
    # A bound in any case: with costs that noise made 0, time alone would let a draft grow for ever.
    size = MAX_SHARE * (target.manifest.num_parameters or weight_bytes(target.folder))
    fitting = [
        shape
        for layers in ([num_layers] if num_layers else range(1, MAX_LAYERS + 1))
        if (shape := _widest(layers, vocab_size, costs, latency_share * target_ms, size))
    ]
    good = [shape for shape in fitting if shape[0] >= DEPTH_WIDTH * shape[1]] or fitting[:1]
    width, layers = good[-1] if good else (WIDTH_STEP, num_layers or 1)
    return ChosenShape(
        num_parameters=count_parameters(width, layers, vocab_size, True),
        num_layers=layers,
        target_ms=round(target_ms, 4),
        draft_ms=round(float(_features(width, layers, vocab_size) @ costs), 4),
    )


def token_ms(folder: Path) -> float:
    """Return the median milliseconds of a forward over one token."""
    from edge_runtime.api import EdgeLLM

    model = EdgeLLM.load(folder).target
    sequence = model.sequence()
    advance(model, sequence, [0] * CONTEXT)
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        advance(model, sequence, [0])
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def _features(width: int, layers: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what a token's time is linear in: 1, layers, megabytes read."""
    return np.array([1.0, layers, count_parameters(width, layers, vocab_size, True) / 1e6])


def _costs(target: Target, fixed: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return t0, t_layer and t_byte in milliseconds, none below zero."""
    rows = np.array([_features(width, layers, fixed["vocab_size"]) for width, layers in PROBES])
    times = np.array([_probe_ms(width, layers, target, fixed) for width, layers in PROBES])
    return np.linalg.solve(rows, times).clip(min=0)


def _probe_ms(width: int, layers: int, target: Target, fixed: dict[str, Any]) -> float:
    """Return the time of a token of a draft with random weights."""
    from edge_export.convert import export_model

    size = count_parameters(width, layers, fixed["vocab_size"], True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = Path(folder) / "draft"
        with quiet():
            from transformers import AutoModelForCausalLM

            AutoModelForCausalLM.from_config(
                draft_config(num_parameters=size, num_layers=layers, **fixed)
            ).save_pretrained(source)
        target.copy_tokenizer(source)
        export_model(source, Path(folder) / "int8", weights="int8")
        return token_ms(Path(folder) / "int8")


def _widest(
    layers: int, vocab_size: int, costs: np.ndarray[Any, Any], budget_ms: float, size: float
) -> tuple[int, int] | None:
    """Return the widest shape of a depth within time and size, (width, layers); None where even the thinnest is not."""
    width = 0
    while True:
        wider = width + WIDTH_STEP
        is_over = float(_features(wider, layers, vocab_size) @ costs) > budget_ms
        if is_over or count_parameters(wider, layers, vocab_size, True) > size:
            return (width, layers) if width else None
        width = wider
