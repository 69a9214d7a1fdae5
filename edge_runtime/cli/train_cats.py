"""`edge-run train cats`: let a model learn to do without the neurons that are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.cli.training import run_adaptation

_TRAINING = "Training"


def _option(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel=_TRAINING)


def train_cats(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="To make, or to go on with.")],
    text: Annotated[list[Path], typer.Option(metavar="PATH", help="Text files or folders. Repeatable.")],
    cats: Annotated[float, typer.Option(metavar="K", help="Share of the MLPs' neurons to skip.")] = 0.5,
    cats_method: Annotated[
        str, typer.Option(metavar="NAME", help="cats: one threshold for each layer; chess: for each neuron.")
    ] = "cats",
    loss: Annotated[str, _option("NAME", "kl: say what the dense model says; ce: what the text says.")] = "kl",
    rank: Annotated[int, _option("N", "Of the LoRA adapters.")] = 64,
    window: Annotated[
        int | None, _option("N", "Tokens trained on at once; by default the context, at most 1024.")
    ] = None,
    max_tokens: Annotated[str | None, _option("N", "Most tokens, such as 5M.")] = None,
    batch_size: Annotated[int, _option("N", "Windows of one update.")] = 8,
    micro_batch_size: Annotated[int, _option("N", "Windows computed at once.")] = 1,
    learning_rate: Annotated[float, _option("X", "Peak; the paper's 1e-5 is for 7B parameters.")] = 5e-4,
    precision: Annotated[str, _option("TYPE", "auto, bf16 or no (f32).")] = "auto",
    seed: Annotated[int, _option("S", "Of the order of the text.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one JSON object.")] = False,
) -> None:
    """Train a model with a share of its neurons skipped: thresholds are found first and stay, LoRA adapters learn and
    are folded in. Export the result with `edge-run export`. Run the same command again to go on after an
    interruption."""
    from edge_export.extra import require_export_extra

    require_export_extra()
    from edge_export.cats.finetune import CatsAdaptation

    run_adaptation(
        CatsAdaptation(cats=cats, method=cats_method, rank=rank, loss_name=loss),
        output,
        "neurons skipped",
        as_json,
        text,
        max_tokens,
        source=source,
        window=window,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        precision=precision,
        seed=seed,
    )
