"""`edge-run train hybrid`: let a model learn to see a part of a longer context."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.cli.options import parse_number
from edge_runtime.cli.training import run_adaptation

_TRAINING = "Training"


def _option(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel=_TRAINING)


def train_hybrid(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id of a dense model.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="To make, or to go on with.")],
    text: Annotated[list[Path], typer.Option(metavar="PATH", help="Text files or folders. Repeatable.")],
    attention: Annotated[
        str, typer.Option(metavar="PATTERN", help="longgen, s2 or window, with sizes: longgen:window=1984,sink=64.")
    ] = "longgen",
    context: Annotated[str | None, typer.Option(metavar="N", help="Tokens of the new context, such as 8192.")] = None,
    rope_theta: Annotated[
        float | None, typer.Option(metavar="X", help="Base of RoPE; by default it grows with the context.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Random weights of the source's shape, as S2-Attention is trained.")
    ] = False,
    window: Annotated[int | None, _option("N", "Tokens trained on at once; by default the context.")] = None,
    max_tokens: Annotated[str | None, _option("N", "Most tokens, such as 5M.")] = None,
    batch_size: Annotated[int, _option("N", "Windows of one update.")] = 8,
    micro_batch_size: Annotated[int, _option("N", "Windows computed at once.")] = 1,
    learning_rate: Annotated[float, _option("X", "Peak.")] = 2e-4,
    precision: Annotated[str, _option("TYPE", "auto, bf16 or no (f32).")] = "auto",
    seed: Annotated[int, _option("S", "Of the order of the text.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one JSON object.")] = False,
) -> None:
    """Train a model whose layers see a part of the context, and lengthen it: one pass over packed texts. Export the
    result with `edge-run export`. Run the same command again to go on after an interruption."""
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
