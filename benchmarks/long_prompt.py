"""A long prompt and its answer, beside openvino_genai's own pipeline: time to the first token, and for each after it.

The model is that of long_context.py (shape of Qwen3-0.6B, random weights in int4); the peer runs the same IR, which it
sees in full. Ours runs it in full too, and with the layers of LongGen and S2-Attention. Keys and values are u8
everywhere. Every round gives all of them one prompt, which no round has had before: nobody reuses a prefix.

    python benchmarks/long_prompt.py --work-dir DIR [--prompt 2048 8192] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from long_context import make_model
from measure import add_peer_tokenizer, machine, paired_ratio, peer_inputs, report, spread

from edge_runtime import EdgeLLM
from edge_runtime.manifest import load_manifest
from edge_runtime.models.attention import AttentionPattern, longgen, s2

LAYERS, KV_HEADS = 28, 8
PATTERNS: dict[str, AttentionPattern | None] = {
    "full": None,
    "longgen": longgen(LAYERS),
    "s2": s2(LAYERS, KV_HEADS, window=1024, stride=8, dense_every=2),
}
NEW_TOKENS = 33
PEER = "genai"


class Times(NamedTuple):
    """Seconds to the first token, and milliseconds for each after it."""

    ttft_s: float
    tpot_ms: float


Answer = Callable[[list[int]], Times]


def with_pattern(model: Path, name: str, context: int) -> Path:
    """Return a copy of a model folder whose layers see what a pattern says, and that takes so many tokens."""
    made = model.with_name(f"{model.name}-{name}")
    if not made.is_dir():
        shutil.copytree(model, made)
    dataclasses.replace(load_manifest(made), attention=PATTERNS[name], context_length=context).save(made)
    return made


def ours(folder: Path) -> Answer:
    """Load with EdgeLLM."""
    llm = EdgeLLM.load(folder, kv_precision="u8")

    def answer(ids: list[int]) -> Times:
        metrics = llm.generate(ids, max_new_tokens=NEW_TOKENS, ignore_eos=True).metrics
        return Times(metrics.ttft_s, metrics.tpot_ms)

    return answer


def peer(folder: Path) -> Answer:
    """Load with openvino_genai."""
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", KV_CACHE_PRECISION="u8")
    config = openvino_genai.GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, do_sample=False)

    def answer(ids: list[int]) -> Times:
        figures = pipeline.generate(peer_inputs(ids), config).perf_metrics
        return Times(figures.get_ttft().mean / 1000, figures.get_tpot().mean)

    return answer


def measure(answers: dict[str, Answer], length: int, vocab: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each way to answer prompts of so many tokens."""
    random = np.random.default_rng(length)
    times: dict[str, list[Times]] = {name: [] for name in answers}
    for _ in range(1 + rounds):
        prompt = random.integers(0, vocab, length).tolist()
        for name, answer in answers.items():
            times[name].append(answer(prompt))
    rows = []
    for name, measured in times.items():
        row: dict[str, Any] = {"impl": name, "prompt": length}
        for number, quantity in enumerate(Times._fields):
            values, base = ([each[number] for each in listed[1:]] for listed in (measured, times[PEER]))
            row[quantity] = spread(values)
            row[f"{quantity}_speedup"] = paired_ratio(base, values).median
        rows.append(row)
    return rows


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where the model is made and kept")
    parser.add_argument("--prompt", type=int, nargs="*", default=[2048, 8192], help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    model = make_model(options.work_dir)
    add_peer_tokenizer(model)
    context = max(options.prompt) + NEW_TOKENS
    answers = {PEER: peer(model), **{name: ours(with_pattern(model, name, context)) for name in PATTERNS}}
    vocab = load_manifest(model).vocab_size
    rows = [row for length in options.prompt for row in measure(answers, length, vocab, options.rounds)]
    checks = {
        f"{row['impl']}, {row['prompt']} tokens: {quantity} no worse than the peer's": row[f"{quantity}_speedup"] >= 1
        for row in rows
        for quantity in Times._fields
        if row["impl"] != PEER
    }
    return report({"rows": rows, "machine": machine()}, checks, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
