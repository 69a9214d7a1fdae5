"""`edge-run bench attention`: what seeing a part of the context saves on this machine, by its length."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.bench.settings import AttentionSettings
from edge_runtime.cli import INTERRUPTED, console
from edge_runtime.cli.options import ADVANCED

_LEGEND = """
edge       edge-run's op; s2/N keeps one KV block in N beside the window, a different one for each KV head
genai      OpenVINO's PagedAttention, which openvino.genai runs
of full    time of full attention in the same op / this time; expected: computed from the keys and weights read
prefill    the whole prompt, estimated from chunks timed along it; decode: one token after it
(from-to)  10th to 90th percentile"""


def _option(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel=ADVANCED)


def bench_attention(
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also measure this model, with each attention pattern in turn."),
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Context length to measure, in tokens. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw time against context length, as a png, svg or pdf file."),
    ] = None,
    stride: Annotated[
        list[int] | None, _option("N", "Stride of S2-Attention: keep one KV block in N. Repeatable.")
    ] = None,
    window: Annotated[int, _option("N", "Local window of S2-Attention, in tokens.")] = AttentionSettings.window,
    kept: Annotated[int, _option("N", "Tokens that a sparse layer of LongGen keeps.")] = AttentionSettings.kept,
    chunk: Annotated[int, _option("N", "Prompt tokens read per step of prefill.")] = AttentionSettings.chunk,
    heads: Annotated[int, _option("H", "Query heads of the measured layer.")] = AttentionSettings.num_heads,
    kv_heads: Annotated[int, _option("H", "KV heads of the measured layer.")] = AttentionSettings.num_kv_heads,
    head_size: Annotated[int, _option("D", "Head size of the measured layer.")] = AttentionSettings.head_size,
    rounds: Annotated[int, _option("N", "Number of timed runs of each measurement.")] = AttentionSettings.rounds,
    longest_peer: Annotated[
        int, _option("N", "Longest context measured in OpenVINO's op, which takes minutes beyond.")
    ] = AttentionSettings.longest_peer,
) -> None:
    """Measure how attention time grows with the context. Full attention, LongGen and S2-Attention run beside OpenVINO's
    op, in one layer and, with --model, in a whole model."""
    from edge_runtime.bench.attention import AttentionBench
    from edge_runtime.bench.attention_plot import save_time_plot
    from edge_runtime.bench.plot import check_plot
    from edge_runtime.devices import describe_devices

    settings = AttentionSettings(
        contexts=tuple(context or AttentionSettings.contexts),
        strides=tuple(AttentionSettings.strides if stride is None else stride),
        window=window,
        kept=kept,
        chunk=chunk,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        rounds=rounds,
        longest_peer=longest_peer,
    )
    if plot:
        check_plot(plot, model=model)
    bench = AttentionBench(settings, model)
    is_interrupted = console.run_with_progress(bench, "contexts", bench.num_cells)
    made = bench.rows()
    if as_json:
        machine = {"devices": describe_devices(), "openvino": version("openvino")}
        console.write_json({"model": model and str(model), **asdict(settings), **machine, "rows": made})
    else:
        _print_tables(made)
        print(_LEGEND)
    if plot:
        save_time_plot(made, plot)
        console.note(f"plotted: {plot}")
    if is_interrupted:
        raise typer.Exit(INTERRUPTED)


def _print_tables(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False, markup=False)
    for scope, phase, context in dict.fromkeys((row["scope"], row["phase"], row["context"]) for row in rows):
        title = f"{'one layer' if scope == 'layer' else 'the model'}, {phase}, {context:,} tokens"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        for name, width in (("impl", 6), ("sees", 8), ("ms", 26), ("of full", 8), ("expected", 8), ("KV MB", 9)):
            table.add_column(
                name, justify="left" if name in ("impl", "sees") else "right", min_width=width, no_wrap=True
            )
        for row in rows:
            if (row["scope"], row["phase"], row["context"]) == (scope, phase, context):
                table.add_row(*_cells(row))
        out.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    expected = row["formula_ratio"]
    return [
        row["impl"],
        row["pattern"] + (f"/{row['stride']}" if row["stride"] else ""),
        f"{row['ms']:,.2f} ({row['ms_p10']:,.2f}-{row['ms_p90']:,.2f})",
        f"{row['ratio']:.2f}",
        f"{expected:.2f}" if expected else "",
        f"{row['kv_bytes'] / 1e6:,.1f}",
    ]
