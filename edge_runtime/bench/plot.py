"""The figure of `edge-run bench draft`: acceptance by K, and measured against predicted speed-up. Extra: bench."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError, MissingExtraError
from edge_runtime.outputs import Input, check_apart

FORMATS = (".png", ".svg", ".pdf")
TOLERANCE = 0.1
"""Band around measured = predicted: within it the step costs explain the speed-up."""
STYLES = {"draft": ("o", "-"), "lookup": ("s", "--"), "random": ("x", ":")}
"""Marker and line of each drafter; a category has its colour."""

DODGE = 0.06
"""Between the categories' points at one K, so that their intervals can be told apart."""
_BARS: dict[str, Any] = {"capsize": 2, "elinewidth": 1}

Rows = list[dict[str, Any]]


def check_plot(path: Path, **inputs: Input) -> None:
    """Refuse a figure that could not be drawn, or would be drawn over what is read, before anything is measured.

    Args:
        path: The figure.
        inputs: What is read, as `outputs.check_apart` takes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: The file's ending names no format, its folder does not exist, or it and an input are not apart.
    """
    check_apart(path, **inputs)
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("a plot needs matplotlib, which is not installed", "bench")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"the plot is `{path}`, expected a name that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"the plot's folder `{path.parent}` does not exist", "create the folder first")


def save_plot(rows: Rows, path: Path) -> None:
    """Draw the rows of a report into a file, whole or not at all.

    Args:
        rows: `DraftBench.rows()`.
        path: With one of FORMATS as its ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    acceptance, speedup = figure.subplots(1, 2)
    colors = {category: f"C{i % 10}" for i, category in enumerate(dict.fromkeys(row["category"] for row in rows))}
    _draw_acceptance(acceptance, rows, colors)
    _draw_speedup(speedup, rows, colors)
    figure.legend(handles=_legend(rows, colors), loc="outside lower center", ncols=6, frameon=False)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib, whole or not at all."""
    path = path.resolve()  # through a link, which stays one
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_acceptance(axes: Any, rows: Rows, colors: dict[str, str]) -> None:
    for drafter, (marker, line) in STYLES.items():
        for category, color in colors.items():
            points = [
                (row["num_draft_tokens"], row["acceptance_rate"], row["acceptance_rate_ci"])
                for row in rows
                if (row["drafter"], row["category"]) == (drafter, category)
                and row["num_draft_tokens"] != "auto"
                and row["acceptance_rate"] is not None
            ]
            if points:
                lengths, rates, intervals = zip(*points, strict=True)
                beside = [length + DODGE * list(colors).index(category) for length in lengths]
                axes.errorbar(beside, rates, _errors(rates, intervals), color=color, marker=marker, ls=line, **_BARS)
    axes.set(title="Accepted drafts", xlabel="K, drafted tokens for each step", ylabel="accepted / proposed")
    axes.set_xticks(sorted({row["num_draft_tokens"] for row in rows} - {0, "auto"}))
    axes.set_ylim(-0.03, 1.03)
    _tidy(axes)


def _draw_speedup(axes: Any, rows: Rows, colors: dict[str, str]) -> None:
    drawn = [row for row in rows if row["drafter"] in STYLES and row["speedup"] and row["predicted_speedup"]]
    for row in drawn:
        errors = _errors([row["speedup"]], [row["speedup_ci"]])
        point = (row["predicted_speedup"], row["speedup"])
        color = colors[row["category"]]
        axes.errorbar(*point, errors, color=color, marker=STYLES[row["drafter"]][0], **_BARS)
        if row["drafter"] == "draft":
            label = str(row["num_draft_tokens"])
            axes.annotate(label, point, (6, -9), textcoords="offset points", fontsize=8, color=color)
    # Of the points, not of their bars: one wide interval would squeeze all others into a corner.
    longest = 1.25 * max([1.0, *(max(row["speedup"], row["predicted_speedup"]) for row in drawn)])
    ends = [0.0, longest]
    axes.fill_between(
        ends, [(1 - TOLERANCE) * end for end in ends], [(1 + TOLERANCE) * end for end in ends], color="0.92", zorder=0
    )
    axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
    axes.axhline(1, color="0.6", linewidth=1, linestyle=":")
    axes.set(title=f"Speed-up over plain decoding (numbers: K; band: {TOLERANCE:.0%})", xlim=ends, ylim=ends)
    axes.set(xlabel="predicted from step costs", ylabel="measured")
    _tidy(axes)


def _legend(rows: Rows, colors: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    used = {row["drafter"] for row in rows}
    drafters = [
        Line2D([], [], color="0.3", marker=marker, linestyle=line, label=drafter)
        for drafter, (marker, line) in STYLES.items()
        if drafter in used
    ]
    return drafters + [Line2D([], [], color=color, linewidth=4, label=name) for name, color in colors.items()]


def _errors(values: Any, intervals: Any) -> list[list[float]]:
    """Return (2, N) distances from each value down and up to the ends of its interval."""
    pairs = list(zip(values, intervals, strict=True))
    return [[max(0.0, v - low) for v, (low, _) in pairs], [max(0.0, high - v) for v, (_, high) in pairs]]


def _tidy(axes: Any) -> None:
    axes.grid(color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
