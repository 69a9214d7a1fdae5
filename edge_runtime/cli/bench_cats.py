"""`edge-run bench cats`: what our MLP op brings on this machine, by rows and sparsity."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.bench.settings import CatsSettings
from edge_runtime.cli import INTERRUPTED, console

if TYPE_CHECKING:
    pass

_LEGEND = """
dead        share of activations that thresholds drop; openvino and dense have none
of dense    the op's time without thresholds / this time; the same for openvino
roofline    weights read / {:.1f} GB/s, a plain read of memory in this run; it bounds few rows
(from-to)   10th to 90th percentile"""


def bench_cats(
    hidden: Annotated[int, typer.Option(metavar="H", help="Inputs and outputs of the MLP.")] = CatsSettings.hidden,
    ffn: Annotated[int, typer.Option(metavar="F", help="Its neurons.")] = CatsSettings.ffn,
    weights: Annotated[list[str] | None, typer.Option(metavar="TYPE", help="int8 or int4; both by default.")] = None,
    rows: Annotated[list[int] | None, typer.Option(metavar="N", help="Tokens of a step. Repeatable.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(metavar="S", help="Share of dead activations. Repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Runs of each cell that count.")] = CatsSettings.rounds,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw time by sparsity: a png, svg or pdf.")
    ] = None,
) -> None:
    """Measure one gated MLP in OpenVINO's own ops, in our op without thresholds, and with shares of dead neurons, in
    turns."""
    from edge_runtime.bench.cats import CatsBench
    from edge_runtime.bench.cats_plot import save_plot
    from edge_runtime.bench.plot import check_plot
    from edge_runtime.devices import describe_devices

    settings = CatsSettings(
        hidden=hidden,
        ffn=ffn,
        weights=tuple(weights or CatsSettings.weights),
        rows=tuple(rows or CatsSettings.rows),
        sparsity=tuple(CatsSettings.sparsity if sparsity is None else sparsity),
        rounds=rounds,
    )
    if plot:
        check_plot(plot)
    bench = CatsBench(settings)
    is_interrupted = console.run_with_progress(bench, "cells", bench.num_cells)
    made = bench.rows()
    if as_json:
        machine = {"devices": describe_devices(), "openvino": version("openvino"), "bandwidth": bench.bandwidth}
        console.write_json({**asdict(settings), **machine, "rows": made})
    else:
        _print_tables(made)
        print(_LEGEND.format(bench.bandwidth / 1e9))
    if plot:
        save_plot(made, plot)
    if is_interrupted:
        raise typer.Exit(INTERRUPTED)


def _print_tables(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False, markup=False)
    for weights, count in dict.fromkeys((row["weights"], row["rows"]) for row in rows):
        group = [row for row in rows if (row["weights"], row["rows"]) == (weights, count)]
        title = f"{weights}, {count} {'row' if count == 1 else 'rows'}"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        for name, width in (("impl", 9), ("dead", 5), ("ms", 20), ("of dense", 9), ("of roofline", 11)):
            table.add_column(name, justify="left" if name == "impl" else "right", min_width=width, no_wrap=True)
        dense = next(row["ms"] for row in group if row["impl"] == "dense")
        for row in group:
            table.add_row(*_cells(row, dense))
        out.print(table)


def _cells(row: dict[str, Any], dense_ms: float) -> list[str]:
    return [
        row["impl"],
        f"{row['sparsity']:.0%}" if row["sparsity"] else "",
        f"{row['ms']:.2f} ({row['ms_p10']:.2f}-{row['ms_p90']:.2f})",
        f"{dense_ms / row['ms']:.2f}",
        f"{row['roofline_ms'] / row['ms']:.0%}",
    ]
