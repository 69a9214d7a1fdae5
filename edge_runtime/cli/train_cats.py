"""`edge-run train cats`: let a model learn to do without the neurons that are skipped."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_runtime.cli.options import ADVANCED
from edge_runtime.cli.training import (
    AsJson,
    BatchSize,
    MaxTokens,
    MicroBatchSize,
    OrderSeed,
    Output,
    Precision,
    Texts,
    option_of,
    run_adaptation,
)


def train_cats(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id of the model to train.")
    ],
    output: Output,
    text: Texts,
    cats: Annotated[float, typer.Option(metavar="K", help="Fraction of the MLP neurons to skip, from 0 to 1.")] = 0.5,
    cats_method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Thresholds: one for each layer (cats) or one for each neuron (chess).",
            rich_help_panel=ADVANCED,
        ),
    ] = "cats",
    loss: Annotated[str, option_of("NAME", "Loss: kl follows the dense model's distribution, ce the text.")] = "kl",
    rank: Annotated[int, option_of("N", "Rank of the LoRA adapters.")] = 64,
    window: Annotated[
        int | None,
        option_of("N", "Train on windows of N tokens; by default the model's context length, at most 1024."),
    ] = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 8,
    micro_batch_size: MicroBatchSize = 1,
    learning_rate: Annotated[
        float, option_of("X", "Peak learning rate; the paper uses 1e-5 for 7B parameters.")
    ] = 5e-4,
    precision: Precision = "auto",
    seed: OrderSeed = 0,
    as_json: AsJson = False,
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
