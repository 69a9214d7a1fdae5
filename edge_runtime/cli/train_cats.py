"""`edge-run train cats`: let a model learn to do without the neurons that are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.cli.options import ADVANCED
from edge_runtime.cli.training import run_adaptation

_TRAINING = "Training"


def _option(metavar: str, help: str, group: str = _TRAINING) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel=group)


def train_cats(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id of the model to train.")
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FOLDER", help="Output folder; an unfinished training resumes in it."),
    ],
    text: Annotated[list[Path], typer.Option(metavar="PATH", help="Text file or folder to train on. Repeatable.")],
    cats: Annotated[float, typer.Option(metavar="K", help="Fraction of the MLP neurons to skip, from 0 to 1.")] = 0.5,
    cats_method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Thresholds: one for each layer (cats) or one for each neuron (chess).",
            rich_help_panel=ADVANCED,
        ),
    ] = "cats",
    loss: Annotated[str, _option("NAME", "Loss: kl follows the dense model's distribution, ce the text.")] = "kl",
    rank: Annotated[int, _option("N", "Rank of the LoRA adapters.")] = 64,
    window: Annotated[
        int | None, _option("N", "Train on windows of N tokens; by default the model's context length, at most 1024.")
    ] = None,
    max_tokens: Annotated[
        str | None, _option("N", "Train on at most N tokens, such as 5M; by default all of the text.")
    ] = None,
    batch_size: Annotated[int, _option("N", "Number of windows in one optimiser update.")] = 8,
    micro_batch_size: Annotated[
        int, _option("N", "Number of windows computed at once; fewer need less memory.", ADVANCED)
    ] = 1,
    learning_rate: Annotated[float, _option("X", "Peak learning rate; the paper uses 1e-5 for 7B parameters.")] = 5e-4,
    precision: Annotated[
        str, _option("TYPE", "Arithmetic of the training: auto, bf16, or no for f32.", ADVANCED)
    ] = "auto",
    seed: Annotated[int, _option("S", "Random seed of the order of the text.", ADVANCED)] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record of the training as one JSON object.")
    ] = False,
) -> None:
    """Train a model to do without the neurons that are skipped. Thresholds are found first and then fixed; LoRA
    adapters are trained and merged. Export the result with `edge-run export`. Run the same command again to resume
    after an interruption."""
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
