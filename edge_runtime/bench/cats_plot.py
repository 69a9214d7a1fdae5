"""The figure of `edge-run bench cats`: time by sparsity, a line for each number of rows. Extra: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_runtime.bench.plot import save_figure

Rows = list[dict[str, Any]]


def save_plot(rows: Rows, path: Path) -> None:
    """Draw the rows of a report into a file, whole or not at all.

    Args:
        rows: `CatsBench.rows()`.
        path: Checked by `bench.plot.check_plot`.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    figure = Figure(figsize=(1 + 5 * len(kinds), 4.8), layout="constrained")
    for axes, weights in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _draw(axes, [row for row in rows if row["weights"] == weights])
        axes.set_title(weights)
    save_figure(figure, path)


def _draw(axes: Any, rows: Rows) -> None:
    """Speed against our dense op, so that all numbers of rows share one scale."""
    for index, count in enumerate(dict.fromkeys(row["rows"] for row in rows)):
        group = [row for row in rows if row["rows"] == count]
        dense = next(row["ms"] for row in group if row["impl"] == "dense")
        ours = [row for row in group if row["impl"] == "cats"]
        shares, speeds = [row["sparsity"] for row in ours], [dense / row["ms"] for row in ours]
        name = f"{count} row" if count == 1 else f"{count} rows"
        axes.plot(shares, speeds, "o-", color=f"C{index}", label=name)
        stock = next(row for row in group if row["impl"] == "openvino")
        axes.plot([0], [dense / stock["ms"]], "x", color=f"C{index}", markersize=9)
    one = [row for row in rows if row["impl"] == "cats" and row["rows"] == 1]
    if one:
        read = next(row for row in rows if row["impl"] == "dense")["bytes_touched"]
        bound = [read / row["bytes_touched"] for row in one]
        axes.plot([row["sparsity"] for row in one], bound, "k:", label="bytes read, 1 row")
    axes.plot([], [], "x", color="gray", label="OpenVINO's own ops")
    axes.axhline(1, color="gray", linewidth=0.8, label="our op, dense")
    axes.set_xlabel("dead activations")
    axes.set_ylabel("speed / our op, dense")
    axes.legend(frameon=False)


def save_model_plot(rows: Rows, path: Path) -> None:
    """Draw the rows of `CatsModelBench`: by tokens of a step, speed beside the dense op's and what is read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, read = figure.subplots(1, 2)
    steps = [row for row in rows if row["rows"]]
    dense = {row["rows"]: row["ms"] for row in steps if row["impl"] == "dense"}
    for name in ("cats", "openvino"):
        group = [row for row in steps if row["impl"] == name]
        counts = [row["rows"] for row in group]
        speed.plot(counts, [dense[row["rows"]] / row["ms"] for row in group], "o-", label=name)
        if name == "cats":
            read.plot(counts, [row["mlp_read"] for row in group], "o-")
    speed.axhline(1, color="gray", linewidth=0.8)
    speed.set_ylabel("speed / our op without thresholds")
    speed.legend(frameon=False)
    read.set_ylabel("share of the MLPs' bytes read")
    read.set_ylim(0, 1.05)
    for axes in (speed, read):
        axes.set_xlabel("tokens of a step, consecutive in the text")
    save_figure(figure, path)
