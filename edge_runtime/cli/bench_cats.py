"""`edge-run bench cats`: what our MLP op brings on this machine, by rows and sparsity."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.bench.settings import CatsSettings
from edge_runtime.cli import INTERRUPTED, console
from edge_runtime.errors import ConfigError

_LEGEND = """
dense       the fused op, which reads all weights, in tiles; cats: the fused op with weights stored neuron by neuron
dead        fraction of the neurons that thresholds skip
of dense    time of dense / time of this row
roofline    time to read the weights at {:.1f} GB/s, the memory bandwidth measured in this run
(from-to)   10th to 90th percentile"""


def bench_cats(
    hidden: Annotated[
        int, typer.Option(metavar="H", help="Hidden size: inputs and outputs of the measured MLP.")
    ] = CatsSettings.hidden,
    ffn: Annotated[int, typer.Option(metavar="F", help="Number of neurons of the measured MLP.")] = CatsSettings.ffn,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE", help="Precision of the weights: int8, int4 or bf16; by default int8 and int4. Repeatable."
        ),
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(metavar="N", help="Number of tokens in a step. Repeatable.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(metavar="S", help="Fraction of the neurons skipped, from 0 to 1. Repeatable.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Number of timed runs of each measurement.")
    ] = CatsSettings.rounds,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw time against the fraction skipped, as a png, svg or pdf file."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Measure a whole model exported with --cats instead of one MLP."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text for --model: perplexity, and neurons read by consecutive tokens, are measured on it.",
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Number of tokens of --text to use.")] = 51_200,
) -> None:
    """Measure how much time skipping neurons saves. One gated MLP runs in turn in OpenVINO's ops, in the fused op, and
    in the fused op with a fraction of its neurons skipped; with --model, a whole model runs the same ways."""
    if model:
        _bench_model(model, text, text_tokens, plot, as_json)
        return
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
        console.note(f"plotted: {plot}")
    if is_interrupted:
        raise typer.Exit(INTERRUPTED)


def _bench_model(model: Path, text: Path | None, text_tokens: int, plot: Path | None, as_json: bool) -> None:
    from edge_runtime.bench.cats_model import CatsModelBench
    from edge_runtime.bench.cats_plot import save_model_plot
    from edge_runtime.bench.plot import check_plot
    from edge_runtime.devices import describe_devices

    if text is None:
        raise ConfigError("--model is given without --text", "add `--text FILE`, a text to measure the model on")
    if not text.is_file():
        raise ConfigError(f"--text is {str(text)!r}, expected a file to measure --model on", "name a text file")
    if plot:
        check_plot(plot, model=model, text=text)
    bench = CatsModelBench(model, text, text_tokens)
    is_interrupted = console.run_with_progress(bench, "parts", bench.num_cells)
    made = bench.rows()
    if as_json:
        machine = {"devices": describe_devices(), "openvino": version("openvino")}
        console.write_json({"model": str(model), "text": str(text), **machine, "rows": made})
    else:
        _print_model(made)
    if plot:
        save_model_plot(made, plot)
        console.note(f"plotted: {plot}")
    if is_interrupted:
        raise typer.Exit(INTERRUPTED)


def _print_model(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["rows"] is None:
            print(f"{row['impl']:9} perplexity {row['perplexity']:.3f} over {row['tokens']:,} tokens")
    print(f"\n{'tokens of a step':>16} {'impl':9} {'ms':>22} {'of dense':>9} {'MLP bytes read':>15}")
    steps = [row for row in rows if row["rows"]]
    for row in steps:
        dense = next(other["ms"] for other in steps if (other["impl"], other["rows"]) == ("dense", row["rows"]))
        took = f"{row['ms']:.2f} ({row['ms_p10']:.2f}-{row['ms_p90']:.2f})"
        print(f"{row['rows']:16} {row['impl']:9} {took:>22} {dense / row['ms']:9.2f} {row['mlp_read']:15.0%}")


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
        f"{row['sparsity']:.0%}" if row["impl"] == "cats" else "",
        f"{row['ms']:.2f} ({row['ms_p10']:.2f}-{row['ms_p90']:.2f})",
        f"{dense_ms / row['ms']:.2f}",
        f"{row['roofline_ms'] / row['ms']:.0%}",
    ]
