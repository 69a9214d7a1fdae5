"""A real target and a real draft, trained by somebody else: is the text right, and how much is accepted?

BabyLlama (EN10/BabyLlama, MIT), two trainings of 0.94 M parameters each on TinyStories. 20 prompts, greedy, up to 150
new tokens, K = 4, float32. Checked: every answer equals that of plain decoding and that of transformers; the acceptance
and the tokens per target forward equal a reference computed once with transformers alone (0.838 and 4.26). Target and
draft are of the same size, so this says nothing about speed.

    python benchmarks/real_pair.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from measure import machine, report

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
NUM_DRAFT_TOKENS = 4
NEW_TOKENS = 150
ACCEPTANCE, ACCEPTANCE_TOLERANCE = 0.838, 0.01
TOKENS_PER_FORWARD, TOKENS_PER_FORWARD_TOLERANCE = 4.26, 0.05
"""Reference of the test data, and how far rounding may move it: a flipped near-tie changes the rest of one answer."""


def export_pair(data: Path, folder: Path) -> tuple[Path, Path]:
    """Export both models in fp32 and return their folders."""
    from edge_export.convert import export_model

    for name in ("target", "draft"):
        export_model(data / "models" / f"babyllama-{name}", folder / name, weights="fp32")
    return folder / "target", folder / "draft"


def transformers_answers(source: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what transformers generates for each prompt, in float32."""
    from edge_export.quiet import quiet

    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )[0, len(prompt) :].tolist()
            answers.append(without_end(made, model.generation_config.eos_token_id))
    return answers


def without_end(token_ids: list[int], eos_token_id: int) -> list[int]:
    """Return an answer without the token that ends it, which EdgeLLM does not report."""
    return token_ids[:-1] if token_ids and token_ids[-1] == eos_token_id else token_ids


def measure_pair(llm: Any, prompts: list[list[int]], reference: list[list[int]]) -> dict[str, Any]:
    """Return equalities and acceptance over all prompts."""
    plain = [llm.generate(ids, max_new_tokens=NEW_TOKENS, num_draft_tokens=0) for ids in prompts]
    drafted = [llm.generate(ids, max_new_tokens=NEW_TOKENS, num_draft_tokens=NUM_DRAFT_TOKENS) for ids in prompts]
    made = [result.metrics for result in drafted]
    forwards = sum(metrics.target_forwards for metrics in made)
    return {
        "prompts": len(prompts),
        "equal_to_plain": sum(a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True)),
        "equal_to_transformers": sum(a.token_ids == b for a, b in zip(drafted, reference, strict=True)),
        "new_tokens": sum(metrics.new_tokens for metrics in made),
        "proposed": sum(metrics.proposed_tokens for metrics in made),
        "accepted": sum(metrics.accepted_tokens for metrics in made),
        "acceptance_rate": sum(m.accepted_tokens for m in made) / sum(m.proposed_tokens for m in made),
        "tokens_per_forward": sum(metrics.new_tokens - 1 for metrics in made) / forwards,
    }


def checks_of(figures: dict[str, Any]) -> dict[str, bool]:
    """Return what must hold."""
    count = figures["prompts"]
    return {
        f"{count}/{count} answers equal plain greedy decoding": figures["equal_to_plain"] == count,
        f"{count}/{count} answers equal transformers": figures["equal_to_transformers"] == count,
        f"acceptance rate is {ACCEPTANCE} within {ACCEPTANCE_TOLERANCE}": abs(figures["acceptance_rate"] - ACCEPTANCE)
        <= ACCEPTANCE_TOLERANCE,
        f"tokens per target forward are {TOKENS_PER_FORWARD} within {TOKENS_PER_FORWARD_TOLERANCE}": abs(
            figures["tokens_per_forward"] - TOKENS_PER_FORWARD
        )
        <= TOKENS_PER_FORWARD_TOLERANCE,
    }


def main() -> int:
    from edge_runtime import EdgeLLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("EDGE_RUN_TEST_DATA") or DATA),
        help="folder with models/babyllama-* and evals/tinystories_prompts20.jsonl",
    )
    arguments = parser.parse_args()
    lines = (arguments.data / "evals" / "tinystories_prompts20.jsonl").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        target, draft = export_pair(arguments.data, Path(folder))
        llm = EdgeLLM.load(target, draft=draft, precision="f32")
        prompts = [llm.tokenizer.encode(json.loads(line)["prompt"]) for line in lines]
        reference = transformers_answers(arguments.data / "models" / "babyllama-target", prompts)
        figures = measure_pair(llm, prompts, reference)
    setting = {"precision": "f32", "kv_precision": "f32", "num_draft_tokens": NUM_DRAFT_TOKENS, "temperature": 0}
    return report({"figures": figures, "setting": setting, "machine": machine()}, checks_of(figures), arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
