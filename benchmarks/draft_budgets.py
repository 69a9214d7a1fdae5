"""How much text a draft needs: perplexity falls with it, acceptance flattens, so a draft is chosen by acceptance.

Takes a finished `edge-run train draft` folder. Its first stage, which sees text alone, is run again for a quarter of
its tokens, a quarter of those and so on, each a training of its own that decays to zero (One Epoch: a checkpoint of a
longer run is no measure of a short one). Perplexity is of held-out windows, acceptance of the same loaded target, over
the same prompts with the same seeds (K = 3, T = 0.6), so differences are paired by prompt.

    python benchmarks/draft_budgets.py --draft WORK/draft --prompts WORK/prompts.jsonl --json --plot budgets.png

Chosen is the smallest budget from which the best one's acceptance differs by an interval that includes 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from draft_stages import Counts, Table, exported, measure, rate, rows_of, with_errors
from measure import machine, report

from edge_export import corpus
from edge_export.fastdraft.recipe import DraftRecipe
from edge_export.fastdraft.stages import train_draft
from edge_export.fastdraft.target import open_target
from edge_export.one_epoch import Ledger
from edge_export.quiet import quiet
from edge_export.train import CHECKPOINT, LEDGER
from edge_runtime.bench.plot import check_plot
from edge_runtime.bench.statistics import ratio_difference_interval

NUM_BUDGETS, STEP = 4, 4
VALIDATION_WINDOWS = 64


def recipe_of(draft: Path) -> DraftRecipe:
    """Return a draft's recipe, for its first stage alone."""
    told = json.loads((draft / "stages" / "recipe.json").read_text(encoding="utf-8"))
    for name in ("text", "code"):
        told[name] = tuple(map(Path, told[name]))
    return DraftRecipe(**told, stages=("pretrain",))


def largest_budget(draft: Path) -> int:
    """Return the tokens that the draft's own first stage saw."""
    num_windows = len(Ledger(draft / "stages" / "pretrain" / CHECKPOINT / LEDGER))
    windows = np.load(next((draft / "stages").glob("text-*.npy")), mmap_mode="r")
    return num_windows * int(windows.shape[1])


def trained(draft: Path, max_tokens: int) -> Path:
    """Return the model of a budget, trained where it is not there, on the windows that were cut for the draft."""
    if max_tokens == largest_budget(draft):
        return draft / "stages" / "pretrain" / "model"
    out = draft / "budgets" / str(max_tokens)
    work = out / "stages"
    if not (work / "pretrain" / "model").is_dir():
        work.mkdir(parents=True, exist_ok=True)
        for windows in (draft / "stages").glob("*-*.npy"):
            shutil.copyfile(windows, work / windows.name)
        train_draft(dataclasses.replace(recipe_of(draft), max_tokens=max_tokens), out, show)
        for windows in work.glob("*-*.npy"):
            windows.unlink()
    return work / "pretrain" / "model"


def show(stage: str, done: int, wanted: int, figure: str) -> None:
    """Print a line now and then."""
    if done % max(1, wanted // 10) == 0:
        print(f"{stage} {done}/{wanted} {figure}", file=sys.stderr, flush=True)


def held_out(draft: Path) -> corpus.Windows:
    """Return windows of the text that no stage trained on."""
    recipe = recipe_of(draft)

    def make() -> corpus.Windows:
        target = open_target(recipe.target, draft / "stages")
        files = corpus.text_files(recipe.text)
        tokens = corpus.tokenize(files, target.tokenizer(), target.end_of_text)
        _, held_out = corpus.split(corpus.cut(tokens, recipe.window or target.window))
        return corpus.shuffled(held_out, 0)[:VALIDATION_WINDOWS]

    return corpus.load_or_make(draft / "budgets" / "held-out.npy", make)


def perplexity(model: Path, windows: corpus.Windows) -> float:
    """Return the perplexity of a draft on windows."""
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        losses = [
            float(network(input_ids=ids, labels=ids, use_cache=False).loss)
            for ids in torch.from_numpy(windows.astype(np.int64)).split(2)
        ]
    return math.exp(sum(losses) / len(losses))


def counts_of(counts: Table, budget: int) -> list[Counts]:
    """Return a budget's counts over the prompts of all categories."""
    return [one for arms in counts.values() for one in arms[str(budget)]]


def chosen(counts: Table, budgets: list[int]) -> int:
    """Return the smallest budget that the best one does not clearly beat."""
    best = max(budgets, key=lambda budget: rate(counts_of(counts, budget)))
    return next(
        budget
        for budget in budgets
        if budget == best or ratio_difference_interval(counts_of(counts, best), counts_of(counts, budget))[0] <= 0
    )


def checks_of(perplexities: dict[int, float], counts: Table) -> dict[str, bool]:
    """Return what the paper found: perplexity falls with every step, acceptance rises ever less."""
    checks = {
        "each step lowers perplexity": all(a > b for a, b in itertools.pairwise(perplexities.values())),
    }
    for category, arms in counts.items():
        rates = [rate(arms[str(budget)]) for budget in perplexities]
        gains = [after - before for before, after in itertools.pairwise(rates)]
        checks[f"{category}: the last step lifts acceptance less than the first"] = gains[-1] < gains[0]
    return checks


def plot(perplexities: dict[int, float], rows: list[dict[str, Any]], choice: int, path: Path) -> None:
    """Draw perplexity and acceptance over the budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = list(perplexities)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    left.plot(budgets, list(perplexities.values()), "o-", color="#4477aa")
    left.set_ylabel("perplexity of held-out text")
    for category in dict.fromkeys(row["category"] for row in rows):
        some = [row for row in rows if row["category"] == category]
        values, errors = with_errors(some)
        right.errorbar(budgets, values, yerr=errors, fmt="o-", capsize=3, label=category)
    right.axvline(choice, color="0.6", linestyle=":", label="chosen")
    right.set_ylabel("accepted / proposed, K = 3, T = 0.6")
    right.legend()
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [f"{budget / 1e6:.2g}M" for budget in budgets])
        axis.set_xlabel("tokens of pre-training, each seen once")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True, help="folder made by `edge-run train draft`")
    parser.add_argument("--prompts", type=Path, required=True, help="held-out JSON lines with prompt and category")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    if arguments.plot:
        check_plot(arguments.plot, draft=arguments.draft, prompts=arguments.prompts)
    largest = largest_budget(arguments.draft)
    budgets = [largest // STEP**power for power in reversed(range(NUM_BUDGETS))]
    models = {budget: trained(arguments.draft, budget) for budget in budgets}
    windows = held_out(arguments.draft)
    perplexities = {budget: round(perplexity(model, windows), 2) for budget, model in models.items()}
    drafts = {str(budget): exported(model, arguments.draft) for budget, model in models.items()}
    counts = measure(Path(recipe_of(arguments.draft).target), drafts, arguments.prompts, arguments.tokens)
    rows, choice = rows_of(counts), chosen(counts, budgets)
    if arguments.plot:
        plot(perplexities, rows, choice, arguments.plot)
    result = {"perplexity": perplexities, "rows": rows, "chosen": choice, "machine": machine()}
    return report(result, checks_of(perplexities, counts), arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
