"""`edge-run bench draft`: what a draft brings on the user's own prompts, beside its baselines."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.bench.settings import DraftSettings
from edge_runtime.cli import INTERRUPTED, console
from edge_runtime.cli.options import ModelOptions
from edge_runtime.cli.running import load_model
from edge_runtime.config import LoadConfig
from edge_runtime.demo import or_demo
from edge_runtime.errors import ConfigError, EdgeError

if TYPE_CHECKING:
    pass

_LENGTHS = ", ".join(map(str, DraftSettings.num_draft_tokens))
_LEGEND = """
per step    tokens emitted per step of the target
MBSU        per step / (1 + K c), with c = {:.4f}, draft bytes per target byte
predicted   speed-up computed from the measured cost of single steps
(from-to)   95% interval over prompts
equal       answers that equal plain decoding token for token"""
# What a table holds, and the least width of a column, so that those of several categories stand below each other.
_COLUMNS = {
    "drafter": 7,
    "K": 4,
    "accepted": 14,
    "per step": 8,
    "MBSU": 5,
    "predicted": 9,
    "speed-up": 17,
    "equal": 5,
}


def bench_draft(
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="JSON lines file; each line has a `prompt` or `turns`, and perhaps a `category`."
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Option("-m", "--target", metavar="FOLDER", help="Target folder; by default the embedded target."),
    ] = None,
    draft: Annotated[
        Path | None,
        typer.Option("-d", "--draft", metavar="FOLDER", help="Draft folder; by default the embedded draft."),
    ] = None,
    num_draft_tokens: Annotated[
        list[int] | None,
        typer.Option(metavar="K", help=f"Draft K tokens before each step; by default {_LENGTHS} in turn. Repeatable."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", metavar="N", help="Longest answer, in tokens.")
    ] = DraftSettings.max_new_tokens,
    temperature: Annotated[
        float,
        typer.Option(
            "-t", "--temperature", metavar="T", help="Sampling temperature; 0 always takes the most likely token."
        ),
    ] = DraftSettings.temperature,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use at most N prompts of each category; by default all.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompts as chat messages, in the chat template.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Device that runs target and draft: CPU, GPU or NPU.")
    ] = LoadConfig.device,
    precision: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Arithmetic precision: auto, f32, bf16 or f16; in f32, answers must equal plain decoding.",
        ),
    ] = LoadConfig.precision,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw acceptance and speed-up, as a png, svg or pdf file.")
    ] = None,
) -> None:
    """Measure the acceptance and speed-up of a draft. Plain decoding, prompt lookup and a random draft run in turn on
    the same prompts for comparison."""
    from edge_runtime.bench.draft import DraftBench, relative_size
    from edge_runtime.bench.plot import check_plot, save_plot
    from edge_runtime.bench.prompts import read_prompts
    from edge_runtime.devices import describe_devices

    settings = DraftSettings(
        num_draft_tokens=tuple(sorted(set(num_draft_tokens or DraftSettings.num_draft_tokens))),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        is_chat=chat,
    )
    if plot:
        check_plot(plot, prompts=prompts, target=target, draft=draft)
    read = read_prompts(prompts, limit)
    pair = _pair(target, draft)
    size = relative_size(*pair)
    load = {"device": device, "precision": precision}
    llm = load_model(ModelOptions(str(pair[0]), str(pair[1]), load, {}), warm_up=True)
    bench = DraftBench(llm, read, settings, size)
    is_interrupted = console.run_with_progress(bench, "answers", bench.num_answers)
    rows = bench.rows()
    if as_json:
        setting = {"target": str(pair[0]), "draft": str(pair[1]), "relative_size": size, **load, **asdict(settings)}
        machine = {"devices": describe_devices(), "openvino": version("openvino")}
        console.write_json({**setting, **machine, "rows": rows, "steps": bench.steps()})
    else:
        _print_tables(rows)
        print(_LEGEND.format(size))
    if plot:
        save_plot(rows, plot)
        console.note(f"plotted: {plot}")
    if is_interrupted:
        raise typer.Exit(INTERRUPTED)
    if precision == "f32":
        _check_equality(rows)


def _pair(target: Path | None, draft: Path | None) -> tuple[Path, Path]:
    """Return the folders that are named, and the embedded ones for those that are not."""
    if target and not draft:
        raise ConfigError("--target is given without --draft", "add `-d FOLDER`, a draft of this target")
    named, drafter = or_demo(target, draft)
    assert drafter is not None
    return Path(named), Path(drafter)


def _check_equality(rows: list[dict[str, Any]]) -> None:
    """Raise EdgeError where greedy answers differ from plain decoding."""
    differing = sum(row["prompts"] - row["equal_to_plain"] for row in rows if row["equal_to_plain"] is not None)
    if differing:
        raise EdgeError(
            f"{differing} answers differ from plain decoding in f32",
            "this is a fault of edge-run: please report it with the prompts",
        )


def _print_tables(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    for category in dict.fromkeys(row["category"] for row in rows):
        table = Table(title=category, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        for title, width in _COLUMNS.items():
            table.add_column(title, justify="left" if title == "drafter" else "right", min_width=width, no_wrap=True)
        for row in rows:
            if row["category"] == category:
                table.add_row(*_cells(row))
        console.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    equal = row["equal_to_plain"]
    return [
        row["drafter"],
        str(row["num_draft_tokens"]),
        _with_interval("{:.0%}", row["acceptance_rate"], row["acceptance_rate_ci"]),
        _number(row["block_efficiency"]),
        _number(row["mbsu"]),
        _number(row["predicted_speedup"]),
        _with_interval("{:.2f}", row["speedup"], row["speedup_ci"]),
        "" if equal is None else f"{equal}/{row['prompts']}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _with_interval(form: str, value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return ""
    low, high = (form.format(end).rstrip("%") for end in interval)
    return f"{form.format(value)} ({low}-{high})"
