"""`edge-run bench attention`: what seeing a part of the context saves on this machine, by its length."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.bench.settings import AttentionSettings
from edge_runtime.cli import INTERRUPTED, console

_LEGEND = """
edge       our op; s2/N: one block of N is seen beside the window, a different one by each KV head
genai      OpenVINO's PagedAttention, which openvino.genai runs
of full    full attention of the same impl / this; expected: by the keys that are seen, and a model's weights
prefill    the whole prompt, from chunks timed at places of it; decode: one token after it
(from-to)  10th to 90th percentile"""


def bench_attention(
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Measure this model too: its weights with each pattern in turn."),
    ] = None,
    context: Annotated[list[int] | None, typer.Option(metavar="N", help="Tokens. Repeatable.")] = None,
    stride: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Of S2-Attention, in blocks. Repeatable.")
    ] = None,
    window: Annotated[int, typer.Option(metavar="N", help="Of S2-Attention, in tokens.")] = AttentionSettings.window,
    kept: Annotated[
        int, typer.Option(metavar="N", help="Tokens that a sparse layer of LongGen keeps.")
    ] = AttentionSettings.kept,
    chunk: Annotated[int, typer.Option(metavar="N", help="Tokens of a step of prefill.")] = AttentionSettings.chunk,
    heads: Annotated[int, typer.Option(metavar="H", help="Of the one layer.")] = AttentionSettings.num_heads,
    kv_heads: Annotated[int, typer.Option(metavar="H", help="Of the one layer.")] = AttentionSettings.num_kv_heads,
    head_size: Annotated[int, typer.Option(metavar="D", help="Of the one layer.")] = AttentionSettings.head_size,
    rounds: Annotated[int, typer.Option(metavar="N", help="Runs of each that count.")] = AttentionSettings.rounds,
    longest_peer: Annotated[
        int, typer.Option(metavar="N", help="Leave OpenVINO's op out beyond so many tokens, where it takes minutes.")
    ] = AttentionSettings.longest_peer,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw time by context: a png, svg or pdf.")
    ] = None,
) -> None:
    """Measure full attention, LongGen and S2-Attention beside OpenVINO's own, by length of the context: one layer, and
    a whole model if one is given."""
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
        check_plot(plot)
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
