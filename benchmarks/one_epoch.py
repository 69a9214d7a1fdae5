"""One Epoch Is All You Need (Komatsuzaki 2019), small: what one pass saves, and whether the size rule helps.

Stated before running, for E = 10: the paper found 1.9 to 3.3 times less time to equal loss; the law for repeated
data of Muennighoff et al. 2023 predicts 1.28 (E = 5: 1.11). Whichever is found is reported.

Passes: E in {1, 5, 10} at equal tokens; the E-pass arms see a random 1/E of the windows E times. Their baseline is the
best validation loss over dropout {0, 0.1, 0.2} x weight decay {0, 0.1}, stopped at the best of the evaluations within a
run or of separate, fully decayed runs of fewer passes. Then separate one-pass runs of 20 to 100 % of the tokens, each
with its own full decay: the smallest budget that reaches the baseline's loss, interpolated in log tokens, is what one
pass needs. Three seeds: initial weights, order and subset.

Rule: from T/P = 0.5 and 80, `one_epoch.adjust` moves size and tokens at equal cost to T/P = 5 and to 20; both are run.

    python benchmarks/one_epoch.py --text FOLDER --work-dir DIR --json --plot one-epoch.png

Every finished run is a line in DIR/runs.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, report

from edge_export import corpus
from edge_export.one_epoch import FLOPS_PER_TOKEN, Budget, adjust
from edge_export.quiet import quiet
from edge_export.train import Progress, TrainConfig, train
from edge_runtime import strict_json
from edge_runtime.bench.plot import check_plot
from edge_runtime.outputs import check_apart

WINDOW, VOCAB_SIZE, BATCH = 128, 1024, 16
WIDTH, LAYERS, HEAD_DIM = 64, 3, 32
SEEDS, PASSES = (0, 1, 2), (1, 5, 10)
DROPOUTS, DECAYS = (0.0, 0.1, 0.2), (0.0, 0.1)
SHARES = (0.2, 0.33, 0.5, 0.75, 1.0)
PREDICTED = {5: {"muennighoff": 1.11}, 10: {"paper": [1.9, 3.3], "muennighoff": 1.28}}
STARTS, RATIOS = (0.5, 80.0), (5.0, 20.0)
NUM_EVALUATIONS, VALIDATION_WINDOWS = 10, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run; its fields name it."""

    num_tokens: int
    passes: int = 1
    dropout: float = 0.0
    weight_decay: float = 0.1
    width: int = WIDTH
    learning_rate: float = 2e-3
    seed: int = 0


class Lab:
    """Trains runs on one corpus and remembers their results.

    Args:
        text: Folder of text.
        work: Folder for windows and results.
    """

    def __init__(self, text: Path, work: Path) -> None:
        self._work, self._log = work, work / "runs.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        windows = corpus.load_or_make(work / "windows.npy", lambda: make_windows(text))
        self._train, held_out = corpus.split(windows)
        self._validation = corpus.shuffled(held_out, 0)[:VALIDATION_WINDOWS]
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.is_file() else []
        self._done = {strict_json.dumps(entry["run"]): entry for entry in map(json.loads, lines)}

    def result(self, run: Run) -> dict[str, Any]:
        """Return a run's losses and seconds, from an earlier time if there was one."""
        name = strict_json.dumps(dataclasses.asdict(run))
        if name not in self._done:
            self._done[name] = {"run": dataclasses.asdict(run), **self._execute(run)}
            with self._log.open("a", encoding="utf-8") as log:
                log.write(strict_json.dumps(self._done[name]) + "\n")
            print(f"{name} {self._done[name]['loss']:.4f}", file=sys.stderr, flush=True)
        return self._done[name]

    def _execute(self, run: Run) -> dict[str, Any]:
        model = make_model(run)
        windows = self._windows(run)
        out = self._work / "run"
        shutil.rmtree(out, ignore_errors=True)
        losses: list[float] = []
        evaluating = 0.0

        def on_step(progress: Progress) -> None:
            nonlocal evaluating
            if progress.step % max(1, progress.num_steps // NUM_EVALUATIONS) == 0:
                begin = time.monotonic()
                losses.append(self._loss(model))
                evaluating += time.monotonic() - begin

        config = TrainConfig(
            batch_size=BATCH,
            micro_batch_size=None,
            learning_rate=run.learning_rate,
            weight_decay=run.weight_decay,
            precision="no",
            passes=run.passes,
            seed=run.seed,
            checkpoint_s=1e9,
        )
        begin = time.monotonic()
        train(model, windows, out, config, on_step=on_step)
        seconds = time.monotonic() - begin - evaluating
        return {"loss": self._loss(model), "losses": losses, "seconds": seconds, "parameters": model.num_parameters()}

    def _windows(self, run: Run) -> corpus.Windows:
        """Return a run's windows: fresh ones once, or a random subset several times, each pass in its own order."""
        pool = corpus.shuffled(self._train, run.seed)[: run.num_tokens // WINDOW // run.passes]
        if run.passes == 1:
            return pool
        return np.concatenate([corpus.shuffled(pool, 100 * run.seed + i) for i in range(run.passes)])

    def _loss(self, model: Any) -> float:
        import torch

        model.eval()
        with torch.no_grad():
            parts = [
                float(model(input_ids=ids, labels=ids).loss)
                for ids in torch.from_numpy(self._validation.astype(np.int64)).split(32)
            ]
        model.train()
        return statistics.mean(parts)


def make_windows(text: Path) -> corpus.Windows:
    """Return the windows of a text under a byte-level BPE of its own."""
    files = corpus.text_files([text])
    tokenizer = corpus.train_bpe(files, VOCAB_SIZE, "<end>")
    return corpus.cut(corpus.tokenize(files, tokenizer, 0), WINDOW)


def make_model(run: Run) -> Any:
    """Return a GPT-2 of the run's width, whose dropout reaches every block."""
    with quiet():
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(run.seed)
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), run.dropout)
        config = GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=WINDOW,
            n_embd=run.width,
            n_layer=LAYERS,
            n_head=num_heads(run.width),
            **drops,
        )
        return GPT2LMHeadModel(config)


def baseline(lab: Lab, passes: int, num_tokens: int, seed: int) -> dict[str, Any]:
    """Return the best early-stopped result of training on 1/E of the windows: tuned on seed 0, then fixed."""
    arms = [
        Run(num_tokens=num_tokens, passes=passes, dropout=dropout, weight_decay=decay)
        for dropout in DROPOUTS
        for decay in DECAYS
    ]
    best = min(arms, key=lambda run: best_loss(lab.result(run)))
    shorter = [
        dataclasses.replace(best, seed=seed, passes=count, num_tokens=num_tokens * count // passes)
        for count in {passes, max(2, passes // 2)}
    ]
    results = [lab.result(run) for run in shorter]
    return min(results, key=best_loss)


def best_loss(result: dict[str, Any]) -> float:
    """Return a run's loss at its best evaluation."""
    return float(min([result["loss"], *result["losses"]]))


def share_to_reach(lab: Lab, loss: float, num_tokens: int, seed: int) -> dict[str, float]:
    """Return the share of tokens, and the seconds, with which one pass reaches a loss; NaN if none of the runs does."""
    runs = [lab.result(Run(num_tokens=int(num_tokens * share), seed=seed)) for share in SHARES]
    points = sorted((run["loss"], math.log(share), run["seconds"]) for run, share in zip(runs, SHARES, strict=True))
    losses, shares, seconds = (np.array(values) for values in zip(*points, strict=True))
    if not losses[0] <= loss <= losses[-1]:
        return {"share": float("nan"), "seconds": float("nan")}
    return {
        "share": float(np.exp(np.interp(loss, losses, shares))),
        "seconds": float(np.interp(loss, losses, seconds)),
    }


def passes_table(lab: Lab, num_tokens: int) -> list[dict[str, Any]]:
    """Return, for each E and seed, the baseline's loss and what one pass needs for it."""
    rows = []
    for passes in PASSES[1:]:
        for seed in SEEDS:
            result = baseline(lab, passes, num_tokens, seed)
            needed = share_to_reach(lab, best_loss(result), num_tokens, seed)
            rows.append(
                {
                    "passes": passes,
                    "seed": seed,
                    "loss": round(best_loss(result), 4),
                    "dropout": result["run"]["dropout"],
                    "weight_decay": result["run"]["weight_decay"],
                    "one_pass_loss": round(lab.result(Run(num_tokens=num_tokens, seed=seed))["loss"], 4),
                    "tokens_speedup": round(1 / needed["share"], 3),
                    "seconds_speedup": round(result["seconds"] / needed["seconds"], 3),
                    "predicted": PREDICTED[passes],
                }
            )
    return rows


def rule_table(lab: Lab, flops: float) -> list[dict[str, Any]]:
    """Return losses at equal cost from two wrong starts and after the rule."""
    rows = []
    for ratio in STARTS:
        start = Budget(parameters=math.sqrt(flops / 6 / ratio), tokens=math.sqrt(flops / 6 * ratio))
        for name, budget in {"start": start, **{f"to {r:g}": adjust(start, r) for r in RATIOS}}.items():
            width = fitting_width(budget.parameters)
            tokens = int(flops / FLOPS_PER_TOKEN / num_parameters(width))  # no width fits exactly: the cost stays equal
            for seed in SEEDS:
                run = Run(num_tokens=tokens // (WINDOW * BATCH) * WINDOW * BATCH, width=width, seed=seed)
                result = lab.result(run)
                rows.append(
                    {
                        "start_ratio": ratio,
                        "arm": name,
                        "seed": seed,
                        "parameters": result["parameters"],
                        "tokens": run.num_tokens,
                        "loss": round(result["loss"], 4),
                        "seconds": round(result["seconds"], 1),
                    }
                )
    return rows


def num_parameters(width: int) -> int:
    """Return the parameters of a model, embeddings included, norms and biases left out."""
    return 12 * LAYERS * width * width + (VOCAB_SIZE + WINDOW) * width


def fitting_width(parameters: float) -> int:
    """Return the width whose model is nearest to a size."""
    widths = (width for width in range(16, 2048, 8) if width % num_heads(width) == 0)
    return min(widths, key=lambda width: abs(num_parameters(width) - parameters))


def num_heads(width: int) -> int:
    """Return how many heads of about HEAD_DIM fit."""
    return max(1, width // HEAD_DIM)


def plot(rows: list[dict[str, Any]], rule: list[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up by E beside its predictions, and loss before and after the rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8))
    for passes in PASSES[1:]:
        found = [row["tokens_speedup"] for row in rows if row["passes"] == passes]
        left.plot([passes] * len(found), found, "o", color="#4477aa", label="found" if passes == 5 else None)
        left.plot(passes, PREDICTED[passes]["muennighoff"], "x", color="#ee6677", label="law" if passes == 5 else None)
    left.fill_between([9.5, 10.5], 1.9, 3.3, alpha=0.2, color="#228833", label="paper, E = 10")
    left.set(xlabel="passes E of the baseline", ylabel="tokens to equal loss, E passes / one", xticks=PASSES[1:])
    left.legend()
    arms = list(dict.fromkeys((row["start_ratio"], row["arm"]) for row in rule))
    for index, arm in enumerate(arms):
        losses = [row["loss"] for row in rule if (row["start_ratio"], row["arm"]) == arm]
        right.plot([index] * len(losses), losses, "o", color="#4477aa")
    right.set_xticks(range(len(arms)), [f"{ratio:g}\n{arm}" for ratio, arm in arms], fontsize=8)
    right.set(xlabel="T/P of the start, and after the rule", ylabel="validation loss at equal cost")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of text")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of the longest run")
    parser.add_argument("--flops", type=float, default=1e13, help="of each run of the size rule")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    check_apart(arguments.work_dir, text=arguments.text)
    if arguments.plot:
        check_plot(arguments.plot, text=arguments.text)
    lab = Lab(arguments.text, arguments.work_dir)
    rows = passes_table(lab, arguments.tokens)
    rule = rule_table(lab, arguments.flops)
    if arguments.plot:
        plot(rows, rule, arguments.plot)
    checks = {
        "one pass has the lower loss at equal tokens, every E and seed": all(
            r["one_pass_loss"] < r["loss"] for r in rows
        )
    }
    return report({"passes": rows, "rule": rule, "machine": machine()}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
