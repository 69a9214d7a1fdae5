"""`edge-run train hybrid`: train a model to attend to a part of a longer context."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_runtime.cli.options import ADVANCED
from edge_runtime.cli.parsing import parse_number
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


def train_hybrid(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id of a dense model.")],
    output: Output,
    text: Texts,
    attention: Annotated[
        str,
        typer.Option(
            metavar="PATTERN",
            help="Attention pattern: longgen, s2 or window, with sizes such as longgen:window=1984,sink=64.",
        ),
    ] = "longgen",
    context: Annotated[
        str | None, typer.Option(metavar="N", help="Context length after training, such as 8192; by default unchanged.")
    ] = None,
    rope_theta: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Base of the rotary embedding (RoPE); by default it grows with --context.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="Start from random weights of the source's shape, as the S2-Attention paper does.",
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    window: Annotated[
        int | None, option_of("N", "Train on windows of N tokens; by default the context length that results.")
    ] = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 8,
    micro_batch_size: MicroBatchSize = 1,
    learning_rate: Annotated[float, option_of("X", "Peak learning rate.")] = 2e-4,
    precision: Precision = "auto",
    seed: OrderSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a model with sparse attention, and lengthen its context. Training is one pass over packed texts. Export the
    result with `edge-run export`. Run the same command again to resume after an interruption."""
    from edge_export.extra import require_export_extra

    require_export_extra()
    from edge_export.hybrid.finetune import HybridAdaptation

    length = int(parse_number("--context", context)) if context else None
    run_adaptation(
        HybridAdaptation(attention, length, rope_theta, from_scratch, seed),
        output,
        "the pattern",
        as_json,
        text,
        max_tokens,
        source=source,
        window=length if window is None else window,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        precision=precision,
        seed=seed,
    )
