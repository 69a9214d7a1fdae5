"""Muon against AdamW, and small against large micro-batches: loss after as many updates on the same text, and tokens/s.

The embedded target's shape (9 M parameters), the same windows in the same order, one pass, a cosine to zero over the
updates of the run.

    python benchmarks/optimizers.py --text FOLDER --updates 100 --json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from train_demo import CONTEXT, END_OF_TEXT, VOCAB_SIZE, model_of_target

from edge_export import corpus
from edge_export.train import Progress, TrainConfig, best_precision, train

ARMS = {
    "adamw 2e-3": {"optimizer": "adamw", "learning_rate": 2e-3},
    "muon 4e-3": {"optimizer": "muon", "learning_rate": 4e-3},
    "muon 8e-3": {"optimizer": "muon", "learning_rate": 8e-3},
    "muon 4e-3, windows all at once": {"optimizer": "muon", "learning_rate": 4e-3, "micro_batch_size": None},
}
LAST = 10
"""Updates whose mean loss is reported."""


def run_arm(windows: corpus.Windows, batch_size: int, options: dict[str, Any]) -> dict[str, float]:
    """Train a fresh model; return its last losses' mean and its speed."""
    losses: list[float] = []

    def on_step(progress: Progress) -> None:
        losses.append(progress.loss)

    config = TrainConfig(**{"micro_batch_size": 2, **options}, batch_size=batch_size, precision=best_precision())
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(model_of_target(), windows, Path(folder), config, on_step=on_step)
    return {
        "loss": round(statistics.mean(losses[-LAST:]), 3),
        "tokens_per_second": round(windows.size / (time.perf_counter() - begin)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of text")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of an update")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    files = corpus.text_files([arguments.text])
    tokenizer = corpus.train_bpe(files, VOCAB_SIZE, END_OF_TEXT)
    cut = corpus.cut(corpus.tokenize(files, tokenizer, 0), CONTEXT)
    windows = corpus.shuffled(cut, 0)[: arguments.updates * arguments.batch_size]
    arms = {name: run_arm(windows, arguments.batch_size, options) for name, options in ARMS.items()}
    checks = {"Muon's loss is below AdamW's": arms["muon 4e-3"]["loss"] < arms["adamw 2e-3"]["loss"]}
    return report({"arms": arms, "updates": arguments.updates, "machine": machine()}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
