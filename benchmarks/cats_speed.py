"""A whole model with fused MLPs, dense and with half of its neurons skipped, beside openvino_genai on the dense IR.

The model is decode.py's: Llama-shaped, 1.04 billion random parameters, so its thresholds are calibrated on its own
activations and its text means nothing; only time is read. All variants decode the same prompt in turn in one process,
in two fresh processes that load them in either order.

    python benchmarks/cats_speed.py --json [--work-dir DIR] [--weights int8 int4] [--cats 0.5]

Ceiling of skipping (bytes): 1 / (1 - f s) with f the share of up and down projections in the bytes of a token and s the
realised sparsity.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from decode import PROMPT_IDS, TARGET, make_source
from measure import add_peer_tokenizer, interleave, machine, paired_ratio, peer_inputs, peer_tpot_ms, report, spread

from edge_runtime import strict_json

WANTED = {"int8": {"cats over dense": 1.22, "cats over peer": 1.4}, "int4": {"dense over peer": 1.5}}
"""Weights to the ratios that are checked."""
PAIRS = (("cats", "dense"), ("cats", "peer"), ("dense", "peer"), ("dense", "stock"), ("stock", "peer"))
"""Variants whose speeds are compared."""


def make_models(folder: Path, weights: str, share: float) -> dict[str, Path]:
    """Return the model folders of one weight format, exported unless they are there."""
    from edge_export.convert import export_model

    source = folder / "source"
    if not source.is_dir():
        make_source(source, TARGET, 0)
    options: dict[str, dict[str, Any]] = {
        "stock": {},
        "dense": {"mlp": "fused"},
        "cats": {"cats": share, "calibration_text": argparse.__file__},
    }
    if weights == "int4":  # a text would also calibrate the 4-bit weights, which takes far too long
        del options["cats"]
    models = {name: folder / f"{name}-{weights}" for name in options}
    for name, path in models.items():
        if not path.is_dir():
            made = export_model(source, path, weights=weights, **options[name])
            if made.sparsity:
                (folder / f"sparsity-{weights}.json").write_text(strict_json.dumps(made.sparsity.realised))
    add_peer_tokenizer(models["stock"])
    return models


def variant(models: dict[str, Path], name: str, tokens: int) -> Callable[[], float]:
    """Load one variant; return a function that decodes once and returns ms per token."""
    if name == "peer":
        import openvino_genai

        pipeline = openvino_genai.LLMPipeline(str(models["stock"]), "CPU")
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        inputs = peer_inputs(PROMPT_IDS)
        return lambda: peer_tpot_ms(pipeline, inputs, config)
    from edge_runtime import EdgeLLM

    llm = EdgeLLM.load(models[name], mlp="auto" if name == "stock" else "fused")
    return lambda: llm.generate(PROMPT_IDS, max_new_tokens=tokens, ignore_eos=True).metrics.tpot_ms


def measure(models: dict[str, Path], order: tuple[str, ...], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Load all variants in an order and decode in turn; return ms per token of each round."""
    return interleave({name: variant(models, name, tokens) for name in order}, rounds, warmup=1)


def ratios_of(weights: str, models: dict[str, Path], tokens: int, rounds: int) -> dict[str, Any]:
    """Return the figures of one weight format."""
    variants = (*models, "peer")
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for order in (variants, variants[::-1]):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            for name, values in fresh.submit(measure, models, order, tokens, rounds).result().items():
                figures[name] += values
    result: dict[str, Any] = {"ms_per_token": {name: spread(values) for name, values in figures.items()}}
    for one, other in PAIRS:
        if one in figures and other in figures:
            result[f"{one} over {other}"] = paired_ratio(figures[other], figures[one])
    if "cats" in models:
        realised = json.loads((models["cats"].parent / f"sparsity-{weights}.json").read_text())
        result["realised sparsity"] = sum(realised) / len(realised)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--work-dir", type=Path, help="where models are made and kept; a temporary folder by default")
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"], choices=["int8", "int4"])
    parser.add_argument("--cats", type=float, default=0.5, help="share of neurons to skip")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each of two processes")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    checks: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for weights in arguments.weights:
            models = make_models(folder, weights, arguments.cats)
            row = ratios_of(weights, models, arguments.tokens, arguments.rounds)
            result[weights] = row
            for name, wanted in WANTED[weights].items():
                checks[f"{weights}: {name} at least {wanted}"] = row[name].median >= wanted
    return report(result, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
