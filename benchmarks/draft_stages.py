"""FastDraft's ablation: what each stage brings to acceptance, and whether the target's own answers beat original text.

Takes a finished `edge-run train draft` folder. Each stage's model becomes an int8 IR and drafts for the same loaded
target over the same prompts with the same seeds (K = 3, T = 0.6, as in the paper), so differences are paired by prompt;
their intervals are bootstraps over prompts. Two more arms start from the same model as the stage align and take as many
windows, both with cross-entropy: `answers` on what the target wrote, `original` on the texts that its prompts were
taken from.

    python benchmarks/draft_stages.py --draft WORK/draft --prompts WORK/prompts.jsonl --json --plot stages.png

Checked are the signs of the paper's table: continuing on code lifts code, alignment lifts text, answers beat original
text, each with an interval that excludes 0; and its final acceptance, text 0.37 and code 0.56.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import machine, report

from edge_runtime import EdgeLLM
from edge_runtime.bench.plot import check_plot
from edge_runtime.bench.prompts import read_prompts
from edge_runtime.bench.rows import rounded
from edge_runtime.bench.statistics import ratio_difference_interval, ratio_interval
from edge_runtime.decoding.drafters.draft_model import DraftModel
from edge_runtime.decoding.engine import Engine

NUM_DRAFT_TOKENS, TEMPERATURE = 3, 0.6
FINAL = {"text": 0.37, "code": 0.56}
"""Acceptance of the paper's aligned Phi-3 draft on summaries and HumanEval."""
SIGNS = (("continue", "pretrain", "code"), ("align", "continue", "text"), ("answers", "original", "text"))


class Counts(NamedTuple):
    """Accepted and proposed tokens of one prompt."""

    accepted: int
    proposed: int


Table = dict[str, dict[str, list[Counts]]]


def extra_arms(draft: Path) -> dict[str, Path]:
    """Return the arms `answers` and `original`, trained where they are not there."""
    from edge_export import corpus
    from edge_export.fastdraft.answer_windows import answer_windows
    from edge_export.fastdraft.losses import alignment_loss
    from edge_export.fastdraft.target import open_target
    from edge_export.one_epoch import Ledger
    from edge_export.train import CHECKPOINT, LEDGER, next_token_loss

    stages = draft / "stages"
    recipe = json.loads((stages / "recipe.json").read_text(encoding="utf-8"))
    kinds = [np.load(path, mmap_mode="r") for path in sorted(stages.glob("*-*.npy"))]
    end_of_text = open_target(recipe["target"], stages).end_of_text
    count = len(Ledger(stages / "align" / CHECKPOINT / LEDGER))
    answers, _ = answer_windows(stages / "answers.jsonl", kinds[0].shape[1], end_of_text, 0)
    original = np.concatenate([some[-1 : -1 - count // len(kinds) : -1] for some in kinds])
    arms = {"answers": (answers[:count], alignment_loss("ce", answers, None)), "original": (original, next_token_loss)}
    return {name: trained(stages, recipe, name, corpus.shuffled(some, 0), loss) for name, (some, loss) in arms.items()}


def trained(stages: Path, recipe: dict[str, Any], name: str, windows: Any, loss: Any) -> Path:
    """Return the model of an arm, trained as the stage align is where it is not there."""
    from edge_export.quiet import quiet
    from edge_export.train import TrainConfig, best_precision, train

    out = stages / name
    if (out / "model").is_dir():
        return out / "model"
    with quiet():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(stages / "continue" / "model", dtype="float32")
    config = TrainConfig(
        batch_size=recipe["batch_size"],
        micro_batch_size=recipe["micro_batch_size"],
        learning_rate=recipe["align_learning_rate"],
        precision=best_precision(),
    )
    model = train(model, windows, out, config, loss=loss)
    with quiet():
        model.save_pretrained(out / "model")
    return out / "model"


def exported(model: Path, draft: Path) -> Path:
    """Return a stage's int8 IR, made where it is not there."""
    from edge_export.convert import export_model

    folder = model.parent / "int8"
    if not folder.is_dir():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((draft / name).read_bytes())
        export_model(model, folder, weights="int8")
    return folder


def measure(
    target: Path,
    drafts: dict[str, Path],
    prompts: Path,
    num_tokens: int,
    temperature: float = TEMPERATURE,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
) -> Table:
    """Return what was accepted of each prompt's drafts by category and arm."""
    options = {"max_new_tokens": num_tokens, "num_draft_tokens": num_draft_tokens, "temperature": temperature}
    counts: Table = {}
    base = None
    for name, folder in drafts.items():
        llm = EdgeLLM.load(target, draft=folder)
        base = base or llm  # one target for all, so that every arm meets the same numbers
        assert isinstance(llm.drafter, DraftModel)
        over = EdgeLLM(Engine(base.target, llm.drafter), llm.tokenizer, llm.manifest, 0.0)
        for prompt in read_prompts(prompts):
            metrics = over.generate(prompt.text, seed=prompt.line, ignore_eos=True, **options).metrics
            made = Counts(metrics.accepted_tokens, metrics.proposed_tokens)
            counts.setdefault(prompt.category, {}).setdefault(name, []).append(made)
    return counts


def rate(counts: list[Counts]) -> float:
    """Return accepted / proposed over all prompts."""
    return sum(one.accepted for one in counts) / sum(one.proposed for one in counts)


def rows_of(counts: Table) -> list[dict[str, Any]]:
    """Return one row for each category and arm."""
    return [
        {
            "category": category,
            "arm": arm,
            "acceptance_rate": round(rate(some), 4),
            "acceptance_rate_ci": rounded(ratio_interval(*zip(*some, strict=True))),
            "prompts": len(some),
        }
        for category, arms in counts.items()
        for arm, some in arms.items()
    ]


def differences_of(counts: Table, pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return one row for each pair of arms in every category: how much more is accepted of the first."""
    return [
        {
            "category": category,
            "difference": f"{one} - {other}",
            "value": round(rate(arms[one]) - rate(arms[other]), 4),
            "ci": rounded(ratio_difference_interval(arms[one], arms[other])),
        }
        for one, other in pairs
        for category, arms in counts.items()
    ]


def checks_of(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> dict[str, bool]:
    """Return what must hold."""
    checks = {}
    for one, other, category in SIGNS:
        found = [d for d in differences if d["difference"] == f"{one} - {other}" and d["category"] == category]
        checks[f"{one} is above {other} on {category}, the interval excludes 0"] = any(d["ci"][0] > 0 for d in found)
    for category, wanted in FINAL.items():
        final = [row for row in rows if (row["category"], row["arm"]) == (category, "align")]
        checks[f"final acceptance on {category} is at least {wanted}"] = any(
            row["acceptance_rate"] >= wanted for row in final
        )
    return checks


def with_errors(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Return the acceptance of rows, (N,), and how far its interval reaches below and above, (2, N)."""
    values = np.array([row["acceptance_rate"] for row in rows])
    return values, np.abs(np.array([row["acceptance_rate_ci"] for row in rows]).T - values)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw acceptance by arm, a panel for each category."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    categories = list(dict.fromkeys(row["category"] for row in rows))
    figure, axes = pyplot.subplots(1, len(categories), figsize=(4 * len(categories), 3.6), sharey=True, squeeze=False)
    for axis, category in zip(axes[0], categories, strict=True):
        some = [row for row in rows if row["category"] == category]
        values, errors = with_errors(some)
        axis.bar([row["arm"] for row in some], values, yerr=errors, capsize=4, color="#4477aa")
        axis.set_title(f"{category}, {some[0]['prompts']} prompts")
        axis.set_ylim(0, 1)
    axes[0][0].set_ylabel("accepted / proposed, K = 3, T = 0.6")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True, help="folder made by `edge-run train draft`, all stages")
    parser.add_argument("--prompts", type=Path, required=True, help="held-out JSON lines with prompt and category")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    if arguments.plot:
        check_plot(arguments.plot, draft=arguments.draft, prompts=arguments.prompts)
    recipe = json.loads((arguments.draft / "stages" / "recipe.json").read_text(encoding="utf-8"))
    stages = arguments.draft / "stages"
    models = {name: stages / name / "model" for name in ("pretrain", "continue", "align")}
    models |= extra_arms(arguments.draft)
    drafts = {name: exported(model, arguments.draft) for name, model in models.items()}
    counts = measure(Path(recipe["target"]), drafts, arguments.prompts, arguments.tokens)
    rows, differences = rows_of(counts), differences_of(counts, dict.fromkeys((one, other) for one, other, _ in SIGNS))
    if arguments.plot:
        plot(rows, arguments.plot)
    result = {"rows": rows, "differences": differences, "machine": machine()}
    return report(result, checks_of(rows, differences), arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
