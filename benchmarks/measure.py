"""What all benchmarks share: interleaved rounds, medians with spread, the machine, the peer's model folder.

Ratios are only read within one run: every round runs each variant once, so a disturbance of the machine hits all.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime import strict_json


class Spread(NamedTuple):
    """Median, 10th and 90th percentile of a variant's rounds."""

    median: float
    p10: float
    p90: float


def interleave(variants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Run every variant once a round, in turn; return their figures without the first `warmup` rounds."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + rounds):
        for name, run in variants.items():
            figures[name].append(run())
    return {name: values[warmup:] for name, values in figures.items()}


def spread(values: list[float]) -> Spread:
    """Return median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1])


def paired_ratio(values: list[float], base: list[float]) -> Spread:
    """Return the spread of round-by-round ratios."""
    return spread([value / other for value, other in zip(values, base, strict=True)])


def machine() -> dict[str, Any]:
    """Return what a reader needs to know of the machine."""
    import openvino as ov

    core = ov.Core()
    return {
        "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "capabilities": core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "openvino": ov.__version__,
    }


def add_peer_tokenizer(folder: Path) -> None:
    """Put the tokenizer files that openvino_genai wants beside our own; does nothing where they are."""
    if (folder / "openvino_tokenizer.xml").is_file():
        return
    from edge_export.quiet import hide_packages

    hide_packages()
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast  # reads tokenizer.json as it is; a model's own class may not

    own = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer, detokenizer = convert_tokenizer(own, with_detokenizer=True)
    ov.save_model(tokenizer, folder / "openvino_tokenizer.xml")
    ov.save_model(detokenizer, folder / "openvino_detokenizer.xml")


def peer_inputs(token_ids: list[int]) -> Any:
    """Return token ids as openvino_genai takes them."""
    import openvino as ov
    import openvino_genai

    ids = np.array([token_ids], np.int64)
    return openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))


def peer_tpot_ms(pipeline: Any, inputs: Any, config: Any) -> float:
    """Return the peer's ms per token after the first, by the wall clock: total minus its own time to the first."""
    begin = time.perf_counter()
    result = pipeline.generate(inputs, config)
    total = 1000 * (time.perf_counter() - begin)
    return (total - result.perf_metrics.get_ttft().mean) / (len(result.tokens[0]) - 1)


def bar_chart(path: Path, title: str, bars: Mapping[str, Spread]) -> None:
    """Draw one bar for each name: the median, with a line from the 10th to the 90th percentile."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    medians, lows, highs = zip(*bars.values(), strict=True)
    ends = np.abs(np.array([lows, highs]) - medians)
    axes.barh(list(bars), medians, xerr=ends, capsize=2, color="#4477aa")
    axes.invert_yaxis()
    axes.set_xlabel(title)
    figure.savefig(path, dpi=120)


def report(result: dict[str, Any], checks: Mapping[str, bool], as_json: bool) -> int:
    """Print one JSON object or a readable list; return the exit code: 0 when every check holds.

    The readable list goes to stderr in both cases, the object to stdout with `as_json`.
    """
    for name, value in result.items():
        print(f"{name}: {strict_json.dumps(value)}", file=sys.stderr)
    for name, holds in checks.items():
        print(f"{'holds' if holds else 'FAILS'}: {name}", file=sys.stderr)
    if as_json:
        print(strict_json.dumps({**result, "checks": dict(checks)}))
    return 0 if all(checks.values()) else 1
