"""`edge-run train hybrid`: train a model to attend to a part of a longer context."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.cli.options import ADVANCED
from edge_runtime.cli.parsing import parse_number
from edge_runtime.cli.training import run_adaptation

_TRAINING = "Training"


def _option(metavar: str, help: str, group: str = _TRAINING) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel=group)


def train_hybrid(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id of a dense model.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FOLDER", help="Output folder; an unfinished training resumes in it."),
    ],
    text: Annotated[list[Path], typer.Option(metavar="PATH", help="Text file or folder to train on. Repeatable.")],
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
        int | None, _option("N", "Train on windows of N tokens; by default the context length that results.")
    ] = None,
    max_tokens: Annotated[
        str | None, _option("N", "Train on at most N tokens, such as 5M; by default all of the text.")
    ] = None,
    batch_size: Annotated[int, _option("N", "Number of windows in one optimiser update.")] = 8,
    micro_batch_size: Annotated[
        int, _option("N", "Number of windows computed at once; fewer need less memory.", ADVANCED)
    ] = 1,
    learning_rate: Annotated[float, _option("X", "Peak learning rate.")] = 2e-4,
    precision: Annotated[
        str, _option("TYPE", "Arithmetic of the training: auto, bf16, or no for f32.", ADVANCED)
    ] = "auto",
    seed: Annotated[int, _option("S", "Random seed of the order of the text.", ADVANCED)] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record of the training as one JSON object.")
    ] = False,
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
