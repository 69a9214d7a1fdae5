"""The options that the commands of `edge-run train` share, and what they show while they work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli import console
from edge_runtime.cli.options import ADVANCED
from edge_runtime.cli.parsing import parse_number

if TYPE_CHECKING:
    from edge_export.adapt import Adaptation
    from edge_export.fastdraft.data import OnProgress

TRAINING = "Training"
"""Heading of the options of a training."""


def option_of(metavar: str, help: str, group: str = TRAINING) -> Any:
    """Return an option for the annotation of a parameter."""
    return typer.Option(metavar=metavar, help=help, rich_help_panel=group)


Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FOLDER", help="Output folder; an unfinished training resumes in it.")
]
Texts = Annotated[list[Path], typer.Option(metavar="PATH", help="Text file or folder to train on. Repeatable.")]
MaxTokens = Annotated[str | None, option_of("N", "Train on at most N tokens, such as 5M; by default all of the text.")]
BatchSize = Annotated[int, option_of("N", "Number of windows in one optimiser update.")]
MicroBatchSize = Annotated[int, option_of("N", "Number of windows computed at once; fewer need less memory.", ADVANCED)]
Precision = Annotated[str, option_of("TYPE", "Arithmetic of the training: auto, bf16, or no for f32.", ADVANCED)]
OrderSeed = Annotated[int, option_of("S", "Random seed of the order of the text.", ADVANCED)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record of the training as one JSON object.")]


class StageBars:
    """A bar for each stage on a terminal's stderr; elsewhere a line as a stage begins."""

    def __init__(self) -> None:
        from rich.progress import TextColumn, TimeRemainingColumn

        counts = TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
        self._bars = console.progress(counts, TimeRemainingColumn(), TextColumn("{task.fields[figure]}"))
        self._stage = ""

    def __enter__(self) -> OnProgress:
        self._bars.start()
        return self._show

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def _show(self, stage: str, done: int, wanted: int, figure: str) -> None:
        if stage != self._stage:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=wanted, figure="")
            if self._bars.disable:
                console.note(f"{stage}: {wanted:,} to do")
        self._bars.update(self._task, completed=done, total=wanted, figure=figure)


def run_adaptation(
    adaptation: Adaptation,
    output: Path,
    change: str,
    as_json: bool,
    text: list[Path],
    max_tokens: str | None,
    **recipe: Any,
) -> None:
    """Train a model under a change, with bars, and say what came out.

    Args:
        adaptation: The change.
        output: The folder to make.
        change: What it is, in the report's words.
        as_json: Whether to print the record of the training instead.
        text: Files and folders to train on.
        max_tokens: Most tokens to train on, as the user wrote it.
        recipe: The other entries of `AdaptRecipe`.
    """
    from edge_export.adapt import AdaptRecipe, adapt

    most = int(parse_number("--max-tokens", max_tokens)) if max_tokens else None
    with StageBars() as on_progress:
        made = adapt(AdaptRecipe(text=tuple(text), max_tokens=most, **recipe), adaptation, output, on_progress)
    if made is None:
        return  # of several processes, the first speaks
    if as_json:
        console.write_json(json.loads((output / "training.json").read_text(encoding="utf-8")))
    else:
        print(
            f"{output}: perplexity on held-out text: {made.original:.2f} dense, {made.before:.2f} with {change}, "
            f"{made.after:.2f} after training on {made.tokens:,} tokens"
        )
        console.note(f"next: edge-run export {output} -o {output}-ir")
