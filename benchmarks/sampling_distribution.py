"""Does speculative sampling emit the model's own distribution? EdgeLLM and openvino_genai, counted against exact odds.

Two tiny random Llamas, target and draft, in float32; temperature 0.8, top-k 4, K = 3, answers of five tokens. The
probability of each first one, two and three tokens is computed from transformers' logits; then each engine answers with
one seed after another, in turn. Reported for each engine: answers that failed, and for each number of tokens the total
variation from the exact distribution, what it stays under in 99 % of exact samplers (`tv_null`), and the p-value of a
chi-square test. openvino_genai without a draft is there to show that the counting treats it fairly. A pipeline that
failed is loaded anew.

    python benchmarks/sampling_distribution.py --json --samples 3000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import add_peer_tokenizer, machine, peer_inputs, report
from scipy.stats import chisquare

PROMPT_IDS = [10, 50, 60, 40, 70, 80, 90, 100]
TEMPERATURE, TOP_K = 0.8, 4
NUM_DRAFT_TOKENS, NEW_TOKENS, COUNTED_TOKENS = 3, 5, 3
SIGNIFICANCE = 0.01
MIN_EXPECTED = 5
"""Prefixes expected less often are counted as one, for the chi-square approximation to hold."""

Prefix = tuple[int, ...]


def make_models(folder: Path) -> dict[str, Path]:
    """Export a tiny random target, and a draft that is the target with disturbed weights."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_models import make_hf_model

    from edge_export.convert import export_model

    source = make_hf_model("llama", folder / "target-source")
    disturbed = disturb(source, folder / "draft-source")
    for name, made in (("target", source), ("draft", disturbed)):
        export_model(made, folder / name, weights="fp32")
        add_peer_tokenizer(folder / name)
    return {"source": source, "target": folder / "target", "draft": folder / "draft"}


def disturb(source: Path, folder: Path, share: float = 0.05) -> Path:
    """Save a copy of a model with noise in its weights: a draft that is right now and then."""
    import shutil

    from edge_export.quiet import quiet

    shutil.copytree(source, folder)
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data += share * parameter.data.std() * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def exact_odds(source: Path) -> dict[Prefix, float]:
    """Return the probability of every answer of COUNTED_TOKENS tokens, by transformers' logits and filters."""
    from edge_export.quiet import quiet

    with quiet():
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        odds: dict[Prefix, float] = {(): 1.0}
        for _ in range(COUNTED_TOKENS):
            longer: dict[Prefix, float] = {}
            for prefix, chance in odds.items():
                ids = torch.tensor([[*PROMPT_IDS, *prefix]])
                with torch.no_grad():
                    scores = model(ids).logits[:, -1]
                scores = TopKLogitsWarper(TOP_K)(ids, TemperatureLogitsWarper(TEMPERATURE)(ids, scores))
                for token_id, share in enumerate(scores.softmax(-1)[0].tolist()):
                    if share > 0:
                        longer[(*prefix, token_id)] = chance * share
            odds = longer
    return odds


class EdgeSampler:
    """Answers of EdgeLLM with a draft."""

    def __init__(self, models: dict[str, Path]) -> None:
        from edge_runtime import EdgeLLM

        self._llm = EdgeLLM.load(models["target"], draft=models["draft"], precision="f32")
        self.accepted = self.proposed = 0

    def __call__(self, seed: int) -> Prefix:
        """Return the answer to a seed."""
        made = self._llm.generate(
            PROMPT_IDS,
            max_new_tokens=NEW_TOKENS,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            num_draft_tokens=NUM_DRAFT_TOKENS,
            seed=seed,
            ignore_eos=True,
        )
        self.accepted += made.metrics.accepted_tokens
        self.proposed += made.metrics.proposed_tokens
        return tuple(made.token_ids)


class PeerSampler:
    """Answers of openvino_genai, with a draft or without."""

    def __init__(self, models: dict[str, Path], *, with_draft: bool) -> None:
        self._models, self._with_draft = models, with_draft
        self._load()

    def _load(self) -> None:
        import openvino_genai

        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        draft = {"draft_model": openvino_genai.draft_model(str(self._models["draft"]), "CPU", **exact)}
        self._pipeline = openvino_genai.LLMPipeline(
            str(self._models["target"]), "CPU", **(draft if self._with_draft else {}), **exact
        )

    def __call__(self, seed: int) -> Prefix | None:
        """Return the answer to a seed; None where the pipeline fails."""
        import openvino_genai

        config = openvino_genai.GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            rng_seed=seed,
            ignore_eos=True,
            apply_chat_template=False,
            **({"num_assistant_tokens": NUM_DRAFT_TOKENS} if self._with_draft else {}),
        )
        try:
            return tuple(self._pipeline.generate(peer_inputs(PROMPT_IDS), config).tokens[0])
        except RuntimeError:
            self._load()
            return None


def compare(counted: Counter[Prefix], odds: dict[Prefix, float], random: np.random.Generator) -> dict[str, float]:
    """Return total variation from the exact odds, its 99th percentile for an exact sampler, and the p-value."""
    names, chances = list(odds), np.array(list(odds.values()))
    total = counted.total()
    observed = np.array([counted[name] for name in names])
    impossible = total - observed.sum()
    null = np.abs(random.multinomial(total, chances / chances.sum(), 1000) / total - chances).sum(1) / 2
    return {
        "tv": float(np.abs(observed / total - chances).sum() + impossible / total) / 2,
        "tv_null": float(np.quantile(null, 0.99)),
        "p": 0.0 if impossible else p_value(observed, chances * total),
    }


def p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    """Return the p-value of a chi-square test, rare cells pooled."""
    rare = expected < MIN_EXPECTED
    observed, expected = (np.append(cells[~rare], cells[rare].sum()) for cells in (observed, expected))
    if not expected[-1]:
        observed, expected = observed[:-1], expected[:-1]
    return float(chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


def shortened(counted: dict[Prefix, Any], length: int) -> Counter[Prefix]:
    """Return counts, or odds, of the first `length` tokens."""
    shorter: Counter[Prefix] = Counter()
    for prefix, count in counted.items():
        shorter[prefix[:length]] += count
    return shorter


def draw(samplers: dict[str, Callable[[int], Prefix | None]], count: int) -> dict[str, Counter[Prefix]]:
    """Return what each sampler answered, seed by seed in turn; failures count as the empty answer."""
    counted: dict[str, Counter[Prefix]] = {name: Counter() for name in samplers}
    for seed in range(count):
        for name, sampler in samplers.items():
            counted[name][(sampler(seed) or ())[:COUNTED_TOKENS]] += 1
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--samples", type=int, default=1000, help="answers of each engine")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        odds = exact_odds(models["source"])
        edge = EdgeSampler(models)
        counted = draw(
            {
                "edge_run with a draft": edge,
                "openvino_genai with a draft": PeerSampler(models, with_draft=True),
                "openvino_genai without": PeerSampler(models, with_draft=False),
            },
            arguments.samples,
        )
    for name, answers in counted.items():
        failed = answers.pop((), 0)
        figures[name] = {"samples": arguments.samples, "failed": failed} | {
            f"first {length}": compare(shortened(answers, length), shortened(odds, length), random)
            for length in range(1, COUNTED_TOKENS + 1)
        }
    ours = figures["edge_run with a draft"]
    ours["acceptance_rate"] = edge.accepted / edge.proposed
    checks = {
        f"p of the first {n} tokens exceeds {SIGNIFICANCE}": ours[f"first {n}"]["p"] > SIGNIFICANCE for n in (1, 2, 3)
    }
    checks["no answer of EdgeLLM failed"] = ours["failed"] == 0
    setting = {"temperature": TEMPERATURE, "top_k": TOP_K, "num_draft_tokens": NUM_DRAFT_TOKENS, "precision": "f32"}
    return report({"figures": figures, "setting": setting, "machine": machine()}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
