"""What skipping neurons costs in quality, and what a block of tokens still reads: CATS beside CHESS, on trained models.

Perplexity on text that thresholds were not found on, by share of neurons skipped; at equal shares both methods read the
same bytes. Weights are rounded to int8 as NNCF does; `dense` is f32. With --recovered, also of models that `edge-run
train cats` has made. Union: share of neurons that at least one of N consecutive tokens wakes, which is what verifying N
tokens reads; `independent` is what it would be if tokens had nothing in common, 1 - s^N.

    python benchmarks/cats_quality.py --calibration FILE --text FILE [MODEL] [--recovered FOLDER...] [--json]

MODEL is a Hugging Face folder or an int8 IR; the embedded target by default. Speed in the plot is the ceiling by bytes
of an MLP that is read once for each token, 1 / (1/3 + 2/3 (1 - s)).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from ir_weights import llama_of_ir
from measure import machine, report

from edge_export import torch_source
from edge_export.cats import MlpFormat
from edge_export.cats.calibrate import find_thresholds, masked, union_density
from edge_export.cats.finetune import read_thresholds
from edge_export.quiet import quiet
from edge_export.sources import open_source
from edge_runtime.bench.plot import check_plot
from edge_runtime.demo import demo_target
from edge_runtime.manifest import MODEL_NAME
from edge_runtime.text.tokenizer import Tokenizer

SHARES = (0.25, 0.4, 0.5, 0.7)
METHODS = ("cats", "chess")
WINDOW = 256
UNION_ROWS = (1, 2, 3, 4, 5, 6, 8)


def load(folder: Path) -> Any:
    """Return the model of a folder in f32."""
    if (folder / MODEL_NAME).is_file():
        return llama_of_ir(folder)
    with quiet():
        return torch_source.load(open_source(folder), "fp32")


def windows_of(folder: Path, text: Path, tokens: int) -> list[list[int]]:
    """Return a text's first tokens, about, in windows."""
    ids = Tokenizer(folder).encode(text.read_text(encoding="utf-8")[: 8 * tokens])[:tokens]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def perplexity(model: Any, windows: list[list[int]]) -> float:
    """Return exp of the mean negative log-likelihood of each window's tokens after the first."""
    losses = []
    for window in windows:
        ids = np.array([window], np.int64)
        logits = torch_source.reference_logits(model, ids)[0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, ids[0, 1:, None], -1)[:, 0]
        losses.append(float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen)))
    return float(np.exp(np.mean(losses)))


def measure(model: Any, calibration: list[list[int]], text: list[list[int]]) -> dict[str, Any]:
    """Return perplexities by method and share, and unions by share, of CATS."""
    rows: list[dict[str, Any]] = [{"method": "dense", "sparsity": 0.0, "perplexity": perplexity(model, text)}]
    round_to_int8(model)
    rows.append({"method": "int8", "sparsity": 0.0, "perplexity": perplexity(model, text)})
    unions: list[dict[str, Any]] = []
    for share in SHARES:
        for method in METHODS:
            thresholds = find_thresholds(model, calibration, MlpFormat(cats=share, cats_method=method))
            with masked(model, thresholds) as dead:
                found = perplexity(model, text)
            realised = float(np.mean([np.mean(shares) for shares in dead]))
            rows.append({"method": method, "sparsity": share, "realised": realised, "perplexity": found})
            if method == "cats":
                for count in UNION_ROWS:
                    union = union_density(model, text, thresholds, count)
                    independent = 1 - realised**count
                    unions.append({"sparsity": share, "rows": count, "union": union, "independent": independent})
    return {"perplexity": rows, "union": unions}


def round_to_int8(model: Any) -> None:
    """Round the weight matrices to what NNCF's int8 keeps: 256 levels from least to largest of each output channel."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
            step = (high - low) / 255
            zero = (-low / step).round()
            weight.copy_(((weight / step + zero).round().clamp(0, 255) - zero) * step)


def measure_recovered(folders: list[Path], text: list[list[int]]) -> list[dict[str, Any]]:
    """Return the perplexities of trained models, rounded to int8 and with their own thresholds."""
    rows = []
    for folder in folders:
        model, (share, method, thresholds) = load(folder), read_thresholds(folder)
        round_to_int8(model)
        with masked(model, thresholds) as dead:
            found = perplexity(model, text)
        realised = float(np.mean([np.mean(shares) for shares in dead]))
        name = f"{method}, trained"
        rows.append({"method": name, "sparsity": share, "realised": realised, "perplexity": found})
    return rows


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity by share, and the union by rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    quality, union = figure.subplots(1, 2)
    dense = result["perplexity"][0]["perplexity"]
    for method in dict.fromkeys(row["method"] for row in result["perplexity"] if row["sparsity"]):
        rows = sorted((row for row in result["perplexity"] if row["method"] == method), key=lambda row: row["realised"])
        speeds = [1 / (1 / 3 + 2 / 3 * (1 - row["realised"])) for row in rows]
        quality.plot(speeds, [row["perplexity"] / dense for row in rows], "o-", label=method)
    quality.axhline(1, color="gray", linewidth=0.8)
    quality.set_xlabel("speed of an MLP, by bytes")
    quality.set_ylabel("perplexity / dense")
    quality.legend(frameon=False)
    for index, share in enumerate(SHARES):
        rows = [row for row in result["union"] if row["sparsity"] == share]
        counts, style = [row["rows"] for row in rows], {"color": f"C{index}"}
        union.plot(counts, [row["union"] for row in rows], "o-", label=f"{share:.0%} skipped", **style)
        union.plot(counts, [row["independent"] for row in rows], ":", **style)
    union.plot([], [], "k:", label="independent tokens")
    union.set_xlabel("tokens of a block")
    union.set_ylabel("neurons read")
    union.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_target())
    parser.add_argument("--calibration", type=Path, required=True, help="text that thresholds are found on")
    parser.add_argument("--text", type=Path, required=True, help="other text, for perplexity")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, default=51_200)
    parser.add_argument("--recovered", type=Path, nargs="*", default=[], help="folders that train cats has made")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--plot", type=Path, help="picture to write")
    arguments = parser.parse_args()
    if arguments.plot:
        check_plot(
            arguments.plot,
            model=arguments.model,
            calibration=arguments.calibration,
            text=arguments.text,
            recovered=arguments.recovered,
        )
    model = load(arguments.model)
    calibration = windows_of(arguments.model, arguments.calibration, arguments.calibration_tokens)
    text = windows_of(arguments.model, arguments.text, arguments.tokens)
    result = measure(model, calibration, text)
    result["perplexity"] += measure_recovered(arguments.recovered, text)
    if arguments.plot:
        save_plot(result, arguments.plot)
    result |= {"tokens": WINDOW * len(text), "machine": machine()}
    by_share = {
        share: [row["perplexity"] for row in result["perplexity"] if row["sparsity"] == share][:2] for share in SHARES
    }
    checks = {
        f"{share:.0%}: CHESS no worse than CATS": chess <= 1.005 * cats for share, (cats, chess) in by_share.items()
    }
    return report(result, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
